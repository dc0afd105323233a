"""Between steps: validation, and previews of the same prompts and seeds."""

import logging
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from fluxfast.config.schema import Config
from fluxfast.data.prepare import Prepared, encoder_dtype
from fluxfast.data.store import TEXT, read_tensors
from fluxfast.model.flux import Flux
from fluxfast.run.plots import plot_validation
from fluxfast.run.validation import Validation, Validator, best, write_validations
from fluxfast.sampling import Picture, contact_sheet, draw_pictures, save_picture
from fluxfast.util.files import warn_on_disk_error

log = logging.getLogger(__name__)


class Watch:
    """Looks at a model from outside; changes nothing of it. A disk that refuses what is written is
    logged, and the run goes on.

    resumed: the `state` that the checkpoint kept, of a run that goes on; what validation.jsonl has
    beside its measurements, a run that was killed may have left. Without `writes` it only knows
    when something is due.
    """

    def __init__(
        self,
        config: Config,
        model: Flux,
        prepared: Prepared,
        device: torch.device,
        resumed: dict | None = None,
        *,
        writes: bool = True,
    ):
        self.config, self.model, self.prepared = config, model, prepared
        self.device = device
        self.file = config.run_dir / "validation.jsonl"
        measured = (resumed or {}).get("validation", [])
        self._rows = [Validation(**row) for row in measured]
        if writes and (measured or self.file.is_file()):
            write_validations(self.file, self._rows)
        self.validator: Any = None  # a Validator, where there are held-out pictures
        if prepared.held_out:
            self.validator = Validator(
                prepared.held_out,
                config.seed,
                config.validation.timesteps,
                config.train.guidance,
            )

    def state(self, done: int) -> dict:
        """What the checkpoint of `done` steps keeps: the measurements until then."""
        return {"validation": [asdict(row) for row in self._rows if row.step <= done]}

    def due(self, done: int) -> bool:
        """Whether there is anything to do after `done` steps (0: before the first)."""
        return self._validation_due(done) or preview_due(self.config, done)

    def _validation_due(self, done: int) -> bool:
        if self.validator is None:
            return False
        return done == self.config.train.steps or done % self.config.validation.every == 0

    def look(self, done: int) -> Validation | None:
        """Measure and draw what is due. -> the measurement where it is the best so far."""
        row = self._validate(done) if self._validation_due(done) else None
        if preview_due(self.config, done):
            with warn_on_disk_error():
                draw_previews(
                    self.config,
                    self.model,
                    self.prepared.prompts,
                    self.prepared.root,
                    self.device,
                    encoder_dtype(self.device),
                    done,
                )
        return row

    def _validate(self, done: int) -> Validation | None:
        row = self.validator.measure(self.model, self.device, done)
        # a resumed run measures its first step again: it may have been killed in this very place
        self._rows = [each for each in self._rows if each.step < done] + [row]
        with warn_on_disk_error():
            write_validations(self.file, self._rows)
            plot_validation(self._rows, self.config.run_dir / "validation.png")
        top = cast(Validation, best(self._rows))
        log.info(_line(row, top))
        return row if top is row else None


def _line(row: Validation, top: Validation) -> str:
    span = "" if row.low is None else f" (95 %: {row.low:+.4f} to {row.high:+.4f})"
    return (
        f"validation at step {row.step}: loss {row.loss:.4f}, {row.difference:+.4f} from the base"
        f"{span}; best at step {top.step}"
    )


# ---------------------------------------------------------------- previews

_FILE = re.compile(r"(\d+)-step(\d+)\.png")


def preview_due(config: Config, done: int) -> bool:
    """Whether previews are drawn after `done` steps (0: before the first)."""
    sample = config.sample
    if not sample.prompts:
        return False
    if done == 0:
        return sample.first
    return done == config.train.steps or bool(sample.every and done % sample.every == 0)


def draw_previews(
    config: Config,
    model: Flux,
    prompts: dict[str, Path],
    root: Path,
    device: torch.device,
    dtype: torch.dtype,
    step: int,
) -> list[Path]:
    """Draw every prompt, save RUN/samples/NN-stepNNNNNNNN.png, redo RUN/samples.png. -> the
    files.
    """
    sample = config.sample
    pictures, embeddings = [], []
    for index, (prompt, file) in enumerate(prompts.items()):
        seed = sample.seed + index if sample.walk_seed else sample.seed
        pictures.append(
            Picture(prompt, seed, sample.width, sample.height, sample.steps, sample.guidance)
        )
        tensors = read_tensors(file, TEXT)
        embeddings.append((tensors["t5"], tensors["pooled"]))
    images = draw_pictures(model, pictures, embeddings, root, device, dtype)
    folder = config.run_dir / "samples"
    files = []
    for index, (picture, image) in enumerate(zip(pictures, images, strict=True)):
        files.append(folder / f"{index:02d}-step{step:08d}.png")
        save_picture(files[-1], image, picture, run=config.name, step=str(step))
    _sheet(config, list(prompts), folder)
    return files


def _sheet(config: Config, prompts: list[str], folder: Path) -> None:
    """The contact sheet, from the files that are there: a resumed run keeps its earlier columns."""
    found = {}
    for file in folder.glob("*.png"):
        match = _FILE.fullmatch(file.name)
        if match:
            found[(int(match[1]), int(match[2]))] = file
    steps = sorted({step for _, step in found})
    rows = [(prompt, [found.get((i, step)) for step in steps]) for i, prompt in enumerate(prompts)]
    contact_sheet(rows, [f"step {step}" for step in steps], config.run_dir / "samples.png")
