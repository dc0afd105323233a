"""What a run leaves on the disk while it trains: checkpoints with their LoRA files, the best step's
file, and at the end the newest checkpoint's files in the run's folder.
"""

import logging
import os
import shutil
from glob import escape
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
from fluxfast.run.resume import PATHS, REFUSED, changes, check_changes, moved, refused, table_key
from fluxfast.step import Training
from fluxfast.util.files import CHECK_FILE, write_atomic

log = logging.getLogger(__name__)


class Saves:
    """A run's checkpoints. newest: (step, folder) of the newest undamaged one, or None."""

    def __init__(self, config: Config):
        """Find the checkpoint to resume from. Raises ConfigError where its configuration is another
        run's, FluxfastError where no checkpoint can be read.
        """
        self.config, self.newest = config, newest_checkpoint(config.run_dir)
        self._content: dict[str, str] = {}  # name -> fingerprint, see `check_content`
        self._moved: dict[str, str] = {}  # key -> line, of paths whose content is to be compared
        if self.newest is not None:
            step, folder = self.newest
            state = read_state(folder, tensors=False)
            self._content = {PATHS["data.folder"]: state["data"], **state.get("content", {})}
            keys = moved(state["config"], config, self._content)
            lines = {line.split()[0]: line for line in changes(state["config"], config, REFUSED)}
            self._moved = {key: lines[key] for key in keys}
            notes = check_changes(state["config"], config, self._moved)
            for line in (f"resuming {config.run_dir} at step {step}", *notes):
                log.info(line)

    @property
    def finished(self) -> bool:
        """Whether the last step is saved, and the run's folder holds that checkpoint's LoRA."""
        if self.newest is None or self.newest[0] < self.config.train.steps:
            return False
        return _steps_of(lora_file(self.config, self.config.run_dir)) == self.newest[0]

    @property
    def fingerprint(self) -> str:
        """The manifest of the newest checkpoint, empty without one."""
        return (
            "" if self.newest is None else (self.newest[1] / MANIFEST).read_text(encoding="utf-8")
        )

    def check_content(self, content: dict[str, str]) -> None:
        """Compare what a run trains on, name -> fingerprint, with what the checkpoint was trained
        on, and remember it for the next. Raises ConfigError for a path that leads elsewhere now,
        to something else; logs what has changed in its place.
        """
        for name, digest in content.items():
            if self._content.get(name, digest) == digest:
                continue
            if lines := [x for key, x in self._moved.items() if PATHS[table_key(key)] == name]:
                raise refused(self.config, lines)
            log.warning(f"note: {name} have changed since this run began: it goes on with others")
        self._content |= content

    def restore(self, run: Training) -> tuple[int, dict[str, Any] | None]:
        """Restore the run from the newest checkpoint. Returns the steps done and the log's state.

        A moving average that the checkpoint lacks starts from its weights.
        """
        if self.newest is None:
            return 0, None
        step, folder = self.newest
        state = read_state(folder)
        try:
            put_weights(run.flat.parameters, state, folder)
            with run.memory.stepping():
                run.flat.load_state_dict(run.optimizer, state["optimizer"])
            if run.ema:
                fresh = {"updates": 0, "average": state["parameters"]}
                run.ema.load_state_dict(state["ema"] or fresh)
        except FluxfastError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise FluxfastError(f"the state in {folder} does not fit this run: {reason}") from None
        if run.ranks.is_main:
            self._restore_best(step, folder)
        return step, state["log"]

    def _restore_best(self, step: int, folder: Path) -> None:
        """Replace the best step's files by the checkpoint's where they are of a later step."""
        current = _best_files(self.config, self.config.run_dir)
        if current and all(0 <= _steps_of(file) <= step for file in current):
            return
        for file in current:
            file.unlink()
        for file in _best_files(self.config, folder):
            write_atomic(self.config.run_dir / file.name, file.read_bytes())

    def save(self, run: Training, done: int, log_state: dict[str, Any]) -> None:
        """Save a checkpoint of `done` steps unless the newest is that one. Raises DiskError. Only
        rank 0 saves.
        """
        if not run.ranks.is_main or (self.newest is not None and self.newest[0] == done):
            return
        with run.memory.stepping():
            state = {
                "step": done,
                "config": self.config.model_dump(mode="json"),
                "data": run.loader.fingerprint,
                "areas": run.loader.dataset.areas,
                "content": self._content,
                "log": log_state,
                "parameters": [parameter.detach() for parameter in run.flat.parameters],
                "optimizer": run.flat.state_dict(run.optimizer),
                "ema": run.ema.state_dict() if run.ema else None,
            }
            keep = self.config.save.keep
            folder = save_checkpoint(
                self.config.run_dir, state, lambda folder: _write_files(run, folder, done), keep
            )
        self.newest = done, folder

    def try_to_save(
        self, run: Training, done: int, log_state: dict[str, Any], retry_at: int | None = None
    ) -> None:
        """Save as `save` does, but log what the disk refuses. retry_at: the step of the next
        attempt, named in the log line.
        """
        try:
            self.save(run, done, log_state)
        except DiskError as error:
            then = f"; the run goes on and is saved at step {retry_at}" if retry_at else ""
            log.warning(f"note: step {done} is not saved: {error.message}{then}")

    def publish(self) -> tuple[int, Path]:
        """Copy the newest checkpoint's LoRA files into the run's folder. Returns (step, file)."""
        assert self.newest is not None, "a run that ends has saved"
        step, folder = self.newest
        for file in folder.glob(f"{escape(self.config.name)}*.safetensors"):
            if file not in _best_files(self.config, folder):
                write_atomic(self.config.run_dir / file.name, file.read_bytes())
        return step, lora_file(self.config, self.config.run_dir)


def save_best(run: Training, done: int, loss: float) -> None:
    """Write NAME_best.safetensors with the current weights. Raises DiskError."""
    file = run.config.run_dir / f"{run.config.name}_best.safetensors"
    _save_formats(run, file, {**_metadata(run, done), "validation_loss": f"{loss:.6f}"})


def _write_files(run: Training, folder: Path, done: int) -> None:
    """Write a checkpoint's LoRA files: NAME, NAME_ema where there is an average, NAME_best."""
    config, metadata = run.config, _metadata(run, done)
    with eval_weights(run.optimizer):
        _save_formats(run, lora_file(config, folder), metadata)
    if run.ema:
        pairs = zip(run.ema.shadow[::2], run.ema.shadow[1::2], strict=True)
        tensors = dict(zip(lora_layers(run.model), pairs, strict=True))
        file = folder / f"{config.name}_ema.safetensors"
        _save_formats(run, file, {**metadata, "ema": str(run.ema.decay)}, tensors)
    for file in _best_files(config, config.run_dir):
        write_atomic(folder / file.name, file.read_bytes())


def _save_formats(run: Training, path: Path, metadata: dict[str, str], tensors=None) -> None:
    """Write `path` in the first of save.formats, and with _FORMAT in its name in the others."""
    save = run.config.save
    for index, form in enumerate(dict.fromkeys(save.formats)):
        file = path.with_stem(f"{path.stem}_{form}") if index else path
        save_lora(run.model, file, form, dtype=save.dtype, metadata=metadata, tensors=tensors)


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
    checked = target / CHECK_FILE  # the next run's settings may name it
    if checked.is_file():
        write_atomic(run_dir / CHECK_FILE, checked.read_bytes())


def lora_file(config: Config, folder: Path) -> Path:
    """Returns the LoRA file's path in a run's or checkpoint's folder."""
    return folder / f"{config.name}.safetensors"


def _steps_of(file: Path) -> int:
    """Returns the step in a LoRA file's metadata; -1 where that cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            return int((opened.metadata() or {})["steps"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return -1


def _best_files(config: Config, folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{escape(config.name)}_best*.safetensors"))


def _metadata(run: Training, step: int) -> dict[str, str]:
    """Returns a LoRA file's metadata, which tells loaders that alpha is folded into the weights."""
    config = run.config
    kind = "flux-1-dev" if run.model.spec.guidance_embed else "flux-1-schnell"
    return {
        "software": f"fluxfast {__version__}",
        "modelspec.architecture": f"{kind}/lora",
        "modelspec.title": config.name,
        "modelspec.trigger_phrase": ", ".join(config.triggers),
        "base_model": config.model.path,
        "rank": str(config.lora.rank),
        "alpha": str(config.lora.alpha or config.lora.rank),
        "alpha_folded": "true",
        "steps": str(step),
        "trigger": ", ".join(config.triggers),
        "config": config.model_dump_json(),
    }
