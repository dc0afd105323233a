"""Between steps: validation, and previews of the same prompts and seeds."""

import logging
from dataclasses import asdict

import torch

from fluxfast.config.schema import Config
from fluxfast.data.prepare import Prepared, encoder_dtype
from fluxfast.model.flux import Flux
from fluxfast.run.plots import plot_validation
from fluxfast.run.preview import draw_previews, preview_due
from fluxfast.run.validation import Validation, Validator, best, write_validations
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
        self.validator = None
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
        top = best(self._rows)
        log.info(_line(row, top))
        return row if top is row else None


def _line(row: Validation, top: Validation) -> str:
    span = "" if row.low is None else f" (95 %: {row.low:+.4f} to {row.high:+.4f})"
    return (
        f"validation at step {row.step}: loss {row.loss:.4f}, {row.difference:+.4f} from the base"
        f"{span}; best at step {top.step}"
    )
