"""Between steps: validation, and previews of the same prompts and seeds."""

import logging
import re
from dataclasses import asdict

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
    """Evaluates a model when that is due, without changing it. What the disk refuses is logged.

    resumed: the `state` in the checkpoint; validation.jsonl may hold later lines of a run that was
    killed, and is rewritten from it. writes: False on ranks that only know when something is due.
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
        self.config, self.model, self.prepared, self.device = config, model, prepared, device
        self.file = config.run_dir / "validation.jsonl"
        self._rows = [Validation(**row) for row in (resumed or {}).get("validation", [])]
        if writes and (self._rows or self.file.is_file()):
            write_validations(self.file, self._rows)
        self.validator = Validator(
            prepared.held_out, config.seed, config.validation.timesteps, config.train.guidance
        )

    def state(self, done: int) -> dict:
        """Returns what the checkpoint of `done` steps keeps: the measurements up to then."""
        return {"validation": [asdict(row) for row in self._rows if row.step <= done]}

    def due(self, done: int) -> bool:
        """Returns whether there is anything to do after `done` steps (0: before the first)."""
        return self._validation_due(done) or self._previews_due(done)

    def look(self, done: int) -> Validation | None:
        """Measure and draw what is due. Returns the measurement if it is the best so far."""
        row = self._validate(done) if self._validation_due(done) else None
        if self._previews_due(done):
            with warn_on_disk_error():
                self._draw_previews(done)
        return row

    def _validation_due(self, done: int) -> bool:
        if not self.prepared.held_out:
            return False
        return done == self.config.train.steps or done % self.config.validation.every == 0

    def _previews_due(self, done: int) -> bool:
        sample = self.config.sample
        if not sample.prompts:
            return False
        if done == 0:
            return sample.first
        return done == self.config.train.steps or bool(sample.every and done % sample.every == 0)

    def _validate(self, done: int) -> Validation | None:
        row = self.validator.measure(self.model, self.device, done)
        # a resumed run repeats its first measurement: it may have been killed right after it
        self._rows = [each for each in self._rows if each.step < done] + [row]
        with warn_on_disk_error():
            write_validations(self.file, self._rows)
            plot_validation(self._rows, self.config.run_dir / "validation.png")
        best_row = best(self._rows)
        assert best_row is not None
        span = "" if row.low is None else f" (95 %: {row.low:+.4f} to {row.high:+.4f})"
        log.info(
            f"validation at step {row.step}: loss {row.loss:.4f}, {row.difference:+.4f} from the "
            f"base{span}; best at step {best_row.step}"
        )
        return row if best_row is row else None

    def _draw_previews(self, done: int) -> None:
        """Draw every prompt, save RUN/samples/NN-stepNNNNNNNN.png, and update RUN/samples.png."""
        sample, prompts = self.config.sample, self.prepared.prompts
        pictures, embeddings = [], []
        for index, (prompt, file) in enumerate(prompts.items()):
            seed = sample.seed + index if sample.walk_seed else sample.seed
            size = sample.width, sample.height
            pictures.append(Picture(prompt, seed, *size, sample.steps, sample.guidance))
            tensors = read_tensors(file, TEXT)
            embeddings.append((tensors["t5"], tensors["pooled"]))
        root, dtype = self.prepared.root, encoder_dtype(self.device)
        images = draw_pictures(self.model, pictures, embeddings, root, self.device, dtype)
        folder = self.config.run_dir / "samples"
        for index, (picture, image) in enumerate(zip(pictures, images, strict=True)):
            path = folder / f"{index:02d}-step{done:08d}.png"
            save_picture(path, image, picture, run=self.config.name, step=str(done))
        # the sheet is made of the files on the disk: a resumed run keeps its earlier columns
        files = {}
        for file in folder.glob("*.png"):
            if match := re.fullmatch(r"(\d+)-step(\d+)", file.stem):
                files[int(match[1]), int(match[2])] = file
        steps = sorted({step for _, step in files})
        rows = [(each, [files.get((i, step)) for step in steps]) for i, each in enumerate(prompts)]
        contact_sheet(rows, [f"step {step}" for step in steps], self.config.run_dir / "samples.png")
