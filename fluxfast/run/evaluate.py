"""Between steps: validation, and previews of the same prompts and seeds."""

import logging
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fluxfast.config.schema import Config
from fluxfast.data.prepare import Prepared, encoder_dtype, preview_pictures
from fluxfast.data.store import CacheDamaged
from fluxfast.encoders.vae import Vae
from fluxfast.formats.lora.apply import sampling_loras
from fluxfast.model.flux import Flux
from fluxfast.run.plots import plot_validation
from fluxfast.run.validation import Validation, Validator, best, write_validations
from fluxfast.sampling.draw import draw_picture, read_embedding
from fluxfast.sampling.picture import Picture, save_picture, settings_of
from fluxfast.sampling.sampler import Embedding
from fluxfast.sampling.sheet import contact_sheet
from fluxfast.util.files import keep_running

log = logging.getLogger(__name__)


class Watch:
    """Evaluates a model when that is due, without changing it. What cannot be measured or drawn is
    a warning: only a damaged cache file is raised, which is repaired.

    resumed: the `state` in the checkpoint; validation.jsonl may hold later lines of a run that was
    killed, and is rewritten from it. attempt: calls what needs memory, a second time where that ran
    out (`MemoryRuntime.attempt`). writes: False on ranks that only know when something is due.
    """

    def __init__(
        self,
        config: Config,
        model: Flux,
        prepared: Prepared,
        device: torch.device,
        resumed: dict | None = None,
        *,
        attempt: Callable[[Callable[[], Any]], Any] = lambda fn: fn(),
        writes: bool = True,
    ):
        self.config, self.model, self.prepared, self.device = config, model, prepared, device
        self._attempt = attempt
        self.file = config.run_dir / "validation.jsonl"
        self._rows = [Validation(**row) for row in (resumed or {}).get("validation", [])]
        if writes and (self._rows or self.file.is_file()):
            with keep_running(self.file):
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
        row = None
        if self._validation_due(done):
            with keep_running(f"validation at step {done}", but=CacheDamaged):
                row = self._validate(done)
        if self._previews_due(done):
            with keep_running(f"the previews of step {done}", but=CacheDamaged):
                self._draw_previews(done)
        return row

    def _validation_due(self, done: int) -> bool:
        if not self.prepared.held_out:
            return False
        return done == self.config.train.steps or done % self.config.validation.every == 0

    def _previews_due(self, done: int) -> bool:
        sample = self.config.sample
        if not self.prepared.prompts:
            return False
        if done == 0:
            return sample.first
        return done == self.config.train.steps or bool(sample.every and done % sample.every == 0)

    def _validate(self, done: int) -> Validation | None:
        row = self._attempt(partial(self.validator.measure, self.model, self.device, done))
        # a resumed run repeats its first measurement: it may have been killed right after it
        self._rows = [each for each in self._rows if each.step < done] + [row]
        with keep_running(self.file):
            write_validations(self.file, self._rows)
        with keep_running("validation.png"):
            plot_validation(self._rows, self.config.run_dir / "validation.png")
        others = [each.step for each in self._rows if each.pictures != row.pictures]
        best_row = best(self._rows)
        assert best_row is not None
        span = "" if row.low is None else f" (95 %: {row.low:+.4f} to {row.high:+.4f})"
        log.info(
            f"validation at step {row.step}: loss {row.loss:.4f}, {row.difference:+.4f} from the "
            f"base{span}; best at step {best_row.step}"
            + (f" (other pictures were held out up to step {others[-1]})" if others else "")
        )
        return row if best_row is row else None

    def _draw_previews(self, done: int) -> None:
        """Draw every prompt, save RUN/samples/NN-stepNNNNNNNN.png, and update RUN/samples.png."""
        pictures = preview_pictures(self.config)
        prompts = [picture.prompt for picture in pictures]
        root, dtype = self.prepared.root, encoder_dtype(self.device)
        folder = self.config.run_dir / "samples"
        with closing(self._attempt(partial(Vae, root, self.device, dtype))) as vae:
            for index, picture in enumerate(pictures):
                with keep_running(f"preview {index} of step {done}", but=CacheDamaged):
                    files = [self.prepared.prompts[prompt] for prompt in picture.prompts]
                    pairs = [read_embedding(file) for file in files]
                    draw = partial(self._draw, vae, picture, pairs)
                    image = self._attempt(draw)
                    path = folder / f"{index:02d}-step{done:08d}.png"
                    _keep_earlier(path, picture)
                    save_picture(path, image, picture, run=self.config.name, step=str(done))
        # the sheet is made of the files on the disk: a resumed run keeps its earlier columns
        files = {}
        for file in folder.glob("*.png"):
            match = re.fullmatch(r"(\d+)-step(\d+)", file.stem)
            if match and settings_of(file).get("prompt") in prompts[int(match[1]) :][:1]:
                files[int(match[1]), int(match[2])] = file
        steps = sorted({step for _, step in files})
        rows = [(each, [files.get((i, step)) for step in steps]) for i, each in enumerate(prompts)]
        contact_sheet(rows, [f"step {step}" for step in steps], self.config.run_dir / "samples.png")

    def _draw(self, vae: Vae, picture: Picture, embeddings: list[Embedding]) -> Image.Image:
        with sampling_loras(self.model, picture.options.loras):
            return draw_picture(self.model, vae, picture, embeddings)


def _keep_earlier(path: Path, picture: Picture) -> None:
    """Rename a picture of this name that was drawn with other settings, before the run was resumed:
    NN-stepSSSSSSSS.1.png and so on.
    """
    earlier = settings_of(path)
    own = {key: value for key, value in earlier.items() if key not in ("run", "step")}
    if earlier and own != picture.settings():
        number = 1
        while (aside := path.with_suffix(f".{number}.png")).exists():
            number += 1
        path.rename(aside)
