"""train(config): prepare, plan, build, resume, loop. The step itself: `step.py`."""

import os
import shutil
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fluxfast import __version__
from fluxfast.assemble import bucket_shapes
from fluxfast.build import build, check_loras
from fluxfast.checkpoint import (
    checkpoints,
    drop_partials,
    identity_of,
    load_checkpoint,
    save_checkpoint,
)
from fluxfast.config import Config, dump_config
from fluxfast.data.loader import Batch, Loader
from fluxfast.errors import FluxfastError
from fluxfast.files import CHECK_FILE, sole_user, write_atomic
from fluxfast.formats.lora import save_lora
from fluxfast.load import resolve_device
from fluxfast.memory.runtime import CURE, MemoryExhausted, is_out_of_memory
from fluxfast.memory.spill import MemorySpills, SpillWatch, card_is_full
from fluxfast.metrics import RunLog, say
from fluxfast.model.flux import Flux
from fluxfast.model.lora import lora_layers, set_assisted
from fluxfast.optim import set_mode
from fluxfast.planning import plan_run, run_lines
from fluxfast.prepare import check_model, prepare
from fluxfast.report import write_report
from fluxfast.signals import stop_event
from fluxfast.step import Training, train_step
from fluxfast.watch import Watch


def train(config: Config, *, restart: bool = False, console: Console | None = None) -> Path:
    """Train a LoRA as configured, from images to file. -> the LoRA file.

    A run of the same name goes on from its newest checkpoint; restart moves it aside first.
    Raises FluxfastError (ConfigError where the configuration is at fault). Ctrl-C saves a
    checkpoint and raises KeyboardInterrupt.
    """
    console = console or Console(stderr=True)
    if restart and config.run_dir.exists():
        check_model(config.model, resolve_device(config.device))  # before anything is moved
        check_loras(config, fresh=True)
        with sole_user(config.run_dir):
            _move_aside(config.run_dir, console)
    with sole_user(config.run_dir):
        return _train(config, console)


def _train(config: Config, console: Console) -> Path:
    drop_partials(config.run_dir)
    device = resolve_device(config.device)
    check_loras(config, fresh=not checkpoints(config.run_dir))
    prepared = prepare(config, device, console)
    loader = Loader(
        prepared.dataset, config.train.batch_size, config.seed, pin=device.type == "cuda"
    )
    plan = plan_run(config, prepared.base, bucket_shapes(loader), device)
    for line in run_lines(plan, device.type == "cuda") if plan else []:
        say(console, line)
    try:
        run = build(config, prepared.base, loader, device, console, plan)
        _check_fits(run.model, loader.batch(0))
        first = _resume(run, console)
        write_atomic(config.run_dir / "config.yaml", dump_config(config).encode())
        if first < config.train.steps:
            watch = Watch(config, run.model, prepared, device, console)
            _loop(run, loader, watch, first, console)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # not in a gradient pass, which takes leaner policies and goes on
        first_line = str(error).splitlines()[0]
        raise FluxfastError(f"the GPU's memory is full: {first_line}", hint=CURE) from None
    return _finish(run, console)


def _check_fits(model: Flux, batch: Batch) -> None:
    """The cached encodings and the transformer must belong together."""
    spec = model.spec
    for what, got, needed in (
        ("T5 states", batch.t5.shape[-1], spec.context_in_dim),
        ("pooled CLIP states", batch.pooled.shape[-1], spec.vec_in_dim),
        ("packed latents", 4 * batch.mean.shape[1], spec.in_channels),
    ):
        if got != needed:
            raise FluxfastError(
                f"the encoders do not belong to this transformer: {what} are "
                f"{got} wide, it takes {needed}",
                hint="model.encoders must name the pipeline folder that the transformer came with",
            )


def _resume(run: Training, console: Console) -> int:
    found = checkpoints(run.config.run_dir)
    if not found:
        return 0
    folder = found[-1][1]
    with run.memory.stepping():
        step = load_checkpoint(
            folder, run.parameters, run.optimizer, run.ema, identity_of(run.config)
        )
    say(console, f"resuming {run.config.run_dir} at step {step}")
    return step


def _loop(run: Training, loader: Loader, watch: Watch, first: int, console: Console) -> None:
    config, train = run.config, run.config.train
    accumulation = train.gradient_accumulation
    batches = loader.iterate(first * accumulation, train.steps * accumulation)
    set_mode(run.optimizer, training=True)
    judged = [0]  # how often policies had changed when intervals were last judged
    spill = SpillWatch(lambda: run.device.type == "cuda" and card_is_full(run.device))

    def judge(seconds: float | None) -> None:
        expected = run.memory.take_expected()
        if judged[0] != run.memory.changes:
            judged[0] = run.memory.changes
            spill.restart()
            return
        if seconds is not None:
            spill.interval(seconds, expected)

    log = RunLog(config.run_dir, first, train.steps, config.log_every, run.device, console, judge)
    if first == 0:
        _look(run, watch, 0)
    run.capture()
    # Ctrl-C stops after the step it falls into
    with log, stop_event(signal.SIGINT) as stop, _saved_where_memory_ends(run, first) as progress:
        for step in range(first, train.steps):
            loss, norm, bad, lr = train_step(
                run, [next(batches) for _ in range(accumulation)], step
            )
            progress.done = done = step + 1
            log.step(done, loss, norm, bad, lr, step * accumulation // loader.batches_per_epoch)
            due = config.save.every and done % config.save.every == 0
            if due or done == train.steps or stop.is_set():
                _save(run, done)
            if watch.due(done):
                with log.pause():
                    _look(run, watch, done)
            if stop.is_set() and done < train.steps:
                raise KeyboardInterrupt


@dataclass
class _Progress:
    done: int


@contextmanager
def _saved_where_memory_ends(run: Training, first: int):
    """Where memory runs out or spills, what was trained so far is saved before the error goes on,
    unless it is an optimiser's step that was cut short."""
    progress = _Progress(first)
    try:
        yield progress
    except (RuntimeError, FluxfastError) as error:
        ended = isinstance(error, MemorySpills | MemoryExhausted) or is_out_of_memory(error)
        if ended and not run.updating and progress.done > first:
            run.graphs.drop()
            _save(run, progress.done)
        raise


def _look(run: Training, watch: Watch, done: int) -> None:
    """Validation and previews, with the weights that would be saved; the best ones are."""
    set_mode(run.optimizer, training=False)
    with run.without_graphs(again=done < run.config.train.steps):
        set_assisted(run.model, False)
        row = watch.look(done)
        set_assisted(run.model, True)
    if row is not None:
        meta = {**_metadata(run, done), "validation_loss": f"{row.loss:.6f}"}
        _save_formats(run, run.config.run_dir / f"{run.config.name}_best.safetensors", meta)
    set_mode(run.optimizer, training=True)


def _save(run: Training, step: int) -> None:
    set_mode(run.optimizer, training=False)
    with run.memory.stepping():
        save_checkpoint(
            run.config.run_dir,
            step,
            run.parameters,
            run.optimizer,
            run.ema,
            identity_of(run.config),
            lambda folder: _write_lora(run, folder, step),
            run.config.save.keep,
        )
    set_mode(run.optimizer, training=True)


def _write_lora(run: Training, folder: Path, step: int) -> Path:
    """NAME.safetensors, and NAME_ema.safetensors where an average is kept."""
    config = run.config
    meta = _metadata(run, step)
    path = folder / f"{config.name}.safetensors"
    _save_formats(run, path, meta)
    if run.ema:
        pairs = zip(run.ema.average[::2], run.ema.average[1::2], strict=True)
        tensors = dict(zip(lora_layers(run.model), pairs, strict=True))
        file = folder / f"{config.name}_ema.safetensors"
        _save_formats(run, file, {**meta, "ema": str(run.ema.decay)}, tensors)
    return path


def _save_formats(run: Training, path: Path, meta: dict[str, str], tensors=None) -> None:
    """`path` in the first of save.formats, `path` with _FORMAT in its name in the others."""
    save = run.config.save
    for index, form in enumerate(dict.fromkeys(save.formats)):
        file = path.with_stem(f"{path.stem}_{form}") if index else path
        save_lora(run.model, file, form, dtype=save.dtype, metadata=meta, tensors=tensors)


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


def _finish(run: Training, console: Console) -> Path:
    """Copy the newest checkpoint's LoRA files to the run folder and write its report."""
    step, folder = checkpoints(run.config.run_dir)[-1]
    for file in folder.glob("*.safetensors"):
        write_atomic(run.config.run_dir / file.name, file.read_bytes())
    path = run.config.run_dir / f"{run.config.name}.safetensors"
    report = write_report(run.config.run_dir)
    say(console, f"{step} steps done; the LoRA is {path}, the report {report}")
    return path


def _move_aside(run_dir: Path, console: Console) -> None:
    """Rename an existing run to NAME.1, NAME.2, …: nothing is deleted."""
    if not run_dir.exists():
        return
    number = 1
    while (target := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    try:
        os.rename(run_dir, target)
    except OSError:
        shutil.move(run_dir, target)
    say(console, f"the earlier run is kept as {target}")
    checked = target / CHECK_FILE  # what the next run may be configured with
    if checked.is_file():
        write_atomic(run_dir / CHECK_FILE, checked.read_bytes())
