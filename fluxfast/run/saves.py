"""What a run leaves on the disk while it trains: checkpoints with their LoRA files, the best step's
file, and in the end the newest checkpoint's files in the run's folder.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fluxfast import __version__
from fluxfast.config.schema import Config
from fluxfast.errors import DiskError, FluxfastError
from fluxfast.formats.lora.apply import save_lora
from fluxfast.model.lora import lora_layers
from fluxfast.optim import eval_weights
from fluxfast.run.checkpoint import (
    MANIFEST,
    newest_checkpoint,
    put_weights,
    read_state,
    save_checkpoint,
)
from fluxfast.run.resume import check_changes
from fluxfast.step import Training
from fluxfast.util.files import CHECK_FILE, write_atomic

log = logging.getLogger(__name__)


class Saves:
    """A run's checkpoints. newest: (step, folder) of the last one that is sound, or None."""

    def __init__(self, config: Config):
        """Finds what there is to go on from. Raises ConfigError where the configuration is another
        run's, FluxfastError where nothing of what there is can be read.
        """
        self.config = config
        self.newest = newest_checkpoint(config.run_dir)
        if self.newest is not None:
            step, folder = self.newest
            lines = check_changes(read_state(folder, tensors=False)["config"], config)
            log.info(f"resuming {config.run_dir} at step {step}")
            for line in lines:
                log.info(line)

    @property
    def finished(self) -> bool:
        """Whether the run's folder has the file of the newest checkpoint, and that is the last."""
        if self.newest is None or self.newest[0] < self.config.train.steps:
            return False
        return _steps_of(lora_file(self.config, self.config.run_dir)) == self.newest[0]

    @property
    def fingerprint(self) -> str:
        """Of every file of the newest checkpoint; empty where there is none."""
        return "" if self.newest is None else (self.newest[1] / MANIFEST).read_text()

    def restore(self, run: Training) -> tuple[int, dict[str, Any] | None]:
        """Put everything back as it was when it was saved. -> the steps done, the log's state.

        An average that the checkpoint does not have starts from its weights.
        """
        if self.newest is None:
            return 0, None
        step, folder = self.newest
        state = read_state(folder)
        try:
            _put_back(run, state, folder)
        except FluxfastError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            said = " ".join(str(error).split())
            raise FluxfastError(f"the state in {folder} does not fit this run: {said}") from None
        if state["data"] != run.loader.fingerprint:
            log.warning(
                "note: the pictures or captions are not those that this run began with: from here "
                "on their order is another"
            )
        if run.ranks.is_main:
            self._restore_best(step, folder)
        return step, state["log"]

    def _restore_best(self, step: int, folder: Path) -> None:
        """The best step's files as of the checkpoint, where they are of a step that comes again."""
        here = _best_files(self.config, self.config.run_dir)
        if here and all(0 <= _steps_of(file) <= step for file in here):
            return
        for file in here:
            file.unlink()
        for file in _best_files(self.config, folder):
            write_atomic(self.config.run_dir / file.name, file.read_bytes())

    def due(self, done: int) -> bool:
        every = self.config.save.every
        return bool(every) and done % every == 0

    def next_due(self, done: int) -> int:
        """The first step after `done` that is."""
        return min(done + self.config.save.every, self.config.train.steps)

    def save(self, run: Training, done: int, logged: dict[str, Any]) -> None:
        """A checkpoint of `done` steps, unless the newest is that. Raises DiskError. Ranks but the
        first save nothing.
        """
        if not run.ranks.is_main or (self.newest is not None and self.newest[0] == done):
            return
        with run.memory.stepping():
            state = {
                "step": done,
                "config": self.config.model_dump(mode="json"),
                "data": run.loader.fingerprint,
                "log": logged,
                "parameters": [parameter.detach() for parameter in run.parameters],
                "optimizer": run.optimizer.state_dict(),
                "ema": run.ema.state_dict() if run.ema else None,
            }
            folder = save_checkpoint(
                self.config.run_dir, state, lambda to: _write_files(run, to, done),
                self.config.save.keep,
            )  # fmt: skip
        self.newest = done, folder

    def try_to_save(
        self, run: Training, done: int, logged: dict[str, Any], again: int | None = None
    ) -> None:
        """`save`, but a disk that refuses is logged, and what there was stays. again: the step at
        which it is tried again.
        """
        try:
            self.save(run, done, logged)
        except DiskError as error:
            then = f"; the run goes on and is saved at step {again}" if again else ""
            log.warning(f"note: step {done} is not saved: {error.message}{then}")

    def publish(self) -> tuple[int, Path]:
        """Copy the newest checkpoint's LoRA files into the run's folder. -> its step, the file."""
        assert self.newest is not None, "a run that ends has saved"
        step, folder = self.newest
        for file in folder.glob(f"{self.config.name}*.safetensors"):
            if file not in _best_files(self.config, folder):
                write_atomic(self.config.run_dir / file.name, file.read_bytes())
        path = lora_file(self.config, self.config.run_dir)
        if not path.is_file():
            raise FluxfastError(f"the checkpoint {folder} has no {path.name}")
        return step, path


def _put_back(run: Training, state: dict[str, Any], folder: Path) -> None:
    put_weights(run.parameters, state, folder)
    with run.memory.stepping():
        run.optimizer.load_state_dict(state["optimizer"])
    if run.ema is not None and state["ema"] is not None:
        run.ema.load_state_dict(state["ema"])
    elif run.ema is not None:
        run.ema.restart(run.parameters)


def save_best(run: Training, done: int, loss: float) -> None:
    """NAME_best.safetensors, of the weights as they are. Raises DiskError."""
    file = run.config.run_dir / f"{run.config.name}_best.safetensors"
    _save_formats(run, file, {**_metadata(run, done), "validation_loss": f"{loss:.6f}"})


def _write_files(run: Training, folder: Path, done: int) -> None:
    """NAME.safetensors, NAME_ema.safetensors where an average is kept, and the best step's."""
    config, meta = run.config, _metadata(run, done)
    with eval_weights(run.optimizer, run.parameters):
        _save_formats(run, lora_file(config, folder), meta)
    if run.ema:
        pairs = zip(run.ema.shadow[::2], run.ema.shadow[1::2], strict=True)
        tensors = dict(zip(lora_layers(run.model), pairs, strict=True))
        file = folder / f"{config.name}_ema.safetensors"
        _save_formats(run, file, {**meta, "ema": str(run.ema.decay)}, tensors)
    for file in _best_files(config, config.run_dir):
        write_atomic(folder / file.name, file.read_bytes())


def _save_formats(run: Training, path: Path, meta: dict[str, str], tensors=None) -> None:
    """`path` in the first of save.formats, `path` with _FORMAT in its name in the others."""
    save = run.config.save
    for index, form in enumerate(dict.fromkeys(save.formats)):
        file = path.with_stem(f"{path.stem}_{form}") if index else path
        save_lora(run.model, file, form, dtype=save.dtype, metadata=meta, tensors=tensors)


def move_aside(run_dir: Path) -> None:
    """Rename an existing run to NAME.1, NAME.2, …: nothing is deleted."""
    number = 1
    while (target := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    try:
        os.rename(run_dir, target)
    except OSError:
        shutil.move(run_dir, target)
    log.info(f"the earlier run is kept as {target}")
    checked = target / CHECK_FILE  # what the next run may be configured with
    if checked.is_file():
        write_atomic(run_dir / CHECK_FILE, checked.read_bytes())


def lora_file(config: Config, folder: Path) -> Path:
    """The LoRA's, in the first of save.formats, in a checkpoint or the run's folder."""
    return folder / f"{config.name}.safetensors"


def _steps_of(file: Path) -> int:
    """The step that a LoRA file is of; -1 where that cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            return int((opened.metadata() or {})["steps"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return -1


def _best_files(config: Config, folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{config.name}_best*.safetensors"))


def _metadata(run: Training, step: int) -> dict[str, str]:
    """Strings for the file's header. alpha is folded into the weights: a loader must not apply it
    again.
    """
    config = run.config
    kind = "flux-1-dev" if run.model.spec.guidance_embed else "flux-1-schnell"
    return {
        "software": f"fluxfast {__version__}",
        "modelspec.architecture": f"{kind}/lora",
        "modelspec.title": config.name,
        "modelspec.trigger_phrase": config.trigger or "",
        "base_model": config.model.path,
        "rank": str(config.lora.rank),
        "alpha": str(config.lora.alpha or config.lora.rank),
        "alpha_folded": "true",
        "steps": str(step),
        "trigger": config.trigger or "",
        "config": config.model_dump_json(),
    }
