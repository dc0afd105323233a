"""Training, from images to LoRA file: prepare, plan, build, resume, loop. One step: `step.py`."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from fluxfast.config.schema import Config, dump_config
from fluxfast.config.yaml_io import apply_override
from fluxfast.data.loader import Loader, fingerprint_of
from fluxfast.data.prepare import Prepared, prepare
from fluxfast.data.store import CacheDamaged
from fluxfast.distributed import Ranks, init_distributed, restart_count
from fluxfast.errors import FluxfastError, LostRank
from fluxfast.formats.base.load import resolve_device
from fluxfast.memory.copies import PinRefused
from fluxfast.memory.planner.report import run_lines
from fluxfast.memory.runtime import (
    CURE,
    MemoryExhausted,
    is_out_of_memory,
    lift_limit,
    memory_reason,
)
from fluxfast.memory.spill import MemorySpills, SpillWatch, card_is_full
from fluxfast.model.lora import set_assisted
from fluxfast.optim import eval_weights, set_mode, skips_exactly
from fluxfast.rng import settle_seed
from fluxfast.run.checkpoint import checkpoints, read_state, stored_areas
from fluxfast.run.diagnose import diagnose
from fluxfast.run.evaluate import Watch
from fluxfast.run.interrupt import Stopped, stop_on_signals
from fluxfast.run.logger import NotFinite, RunLog
from fluxfast.run.preflight import check_fits, check_memory, check_start
from fluxfast.run.report import write_report
from fluxfast.run.resume import PATHS, settings, weights_of
from fluxfast.run.saves import Saves, lora_file, move_aside, save_best
from fluxfast.setup import bucket_shapes, build
from fluxfast.step import Training, train_step
from fluxfast.tools.plan import plan_run
from fluxfast.util.files import (
    check_no_links,
    check_writable,
    drop_partials,
    exclusive_lock,
    keep_running,
    write_atomic,
)

log = logging.getLogger(__name__)


def train(config: Config, *, restart: bool = False) -> Path:
    """Train a LoRA as configured. Returns the LoRA file.

    A run of the same name resumes from its newest checkpoint; restart moves it aside first. Under
    torchrun every process trains the same LoRA on its share of every batch.
    Raises FluxfastError (ConfigError where the configuration is at fault), and Stopped, a
    KeyboardInterrupt, after a signal asked it to stop and the checkpoint is saved.
    """
    with init_distributed() as ranks, ExitStack() as locks:
        for size in config.batch_sizes:
            ranks.shard(size)  # raises before anything is done
        ranks.check_same("their configuration", dump_config(config))
        if ranks.is_main:
            # a restart by torchrun itself resumes: what was trained before must not be moved aside
            if restart and restart_count() == 0 and config.run_dir.exists():
                check_start(config, resolve_device(config.device), fresh=True)
                with exclusive_lock(config.run_dir):
                    move_aside(config.run_dir)
            locks.enter_context(exclusive_lock(config.run_dir))
        ranks.barrier()
        path = _with_cache_repaired(_with_seeds(config, ranks), ranks)
        ranks.barrier()  # until rank 0 has written everything
        return path


def _with_seeds(config: Config, ranks: Ranks) -> Config:
    """Returns the configuration with a seed for each -1: the one that the run began with, or one
    that is drawn; on every rank the same.
    """
    keys = [k for k, v in settings(config).items() if k.endswith("seed") and v == -1]
    if not keys:
        return config
    begun: dict = {}
    for _, folder in checkpoints(config.run_dir):
        with suppress(FluxfastError):  # damaged; a later one has the same seeds
            begun = settings(read_state(folder, tensors=False)["config"])
    drawn = ranks.all_gather_json({key: settle_seed(-1, begun.get(key)) for key in keys})[0]
    log.info(f"drawn once, and kept in config.yaml: {', '.join(f'{k} {drawn[k]}' for k in keys)}")
    raw = config.model_dump(mode="json")
    for key in keys:
        apply_override(raw, f"{key}={drawn[key]}")
    return Config.model_validate(raw)


def _with_cache_repaired(config: Config, ranks: Ranks) -> Path:
    """Train; a cache file that is found damaged or gone is encoded again, and the run resumes.

    Once for each file, as a failing disk might repeat it forever. Several ranks end instead, as
    only one has found the damage; their next start repairs it.
    """
    repaired: set[Path] = set()
    while True:
        try:
            return _train(config, ranks)
        except CacheDamaged as error:
            if ranks.world_size > 1 or error.path in repaired:
                raise
            repaired.add(error.path)
            log.warning(f"note: {error.message}; it is encoded anew, and the run goes on")
        gc.collect()  # frees the model before the encoders are loaded


def _train(config: Config, ranks: Ranks) -> Path:
    with ranks.main_process_first():
        if ranks.is_main:
            check_no_links(config.run_dir, "checkpoints", "samples", "tensorboard", "metrics.jsonl")
            drop_partials(*(config.run_dir / below for below in (".", "checkpoints", "samples")))
            check_writable(config.run_dir)
        saves = Saves(config)
    ranks.check_same("the checkpoint they go on from", saves.fingerprint)
    device = resolve_device(config.device)
    with ranks.main_process_first():  # one fetches what is on the Hub
        parts = check_start(config, device, fresh=not checkpoints(config.run_dir))
    saves.check_content(weights_of(config, parts))
    check = partial(check_memory, config, parts, device, ranks)
    prepared = prepare(config, device, ranks, parts, check, stored_areas(config.run_dir))
    pin = device.type == "cuda"
    loader = Loader(
        prepared.dataset, config.train.batch_size, config.seed, pin=pin, shard=ranks.shard
    )
    pictures = {"data.folder": loader.fingerprint}
    if config.validation.folder:
        pictures["validation.folder"] = fingerprint_of(prepared.held_out)
    saves.check_content({PATHS[key]: digest for key, digest in pictures.items()})
    ranks.check_same("the pictures or captions they read", loader.fingerprint)
    if ranks.world_size > 1:
        shares = [f"{len(ranks.shard(size))} of {size}" for size in sorted(set(config.batch_sizes))]
        log.info(f"{ranks.world_size} processes, each takes {', '.join(shares)} samples")
    # the first all-reduce allocates buffers on the device, which free memory is planned without
    ranks.all_reduce_(torch.zeros(1, device=device))
    try:
        run = _build(config, prepared, loader, device, ranks)
        check_fits(loader.batch(0), run.model.spec)
        first, log_state = saves.restore(run)
        if ranks.is_main:
            write_atomic(config.run_dir / "config.yaml", dump_config(config).encode())
        if not ranks.any(saves.finished):
            watch = Watch(
                config,
                run.model,
                prepared,
                device,
                log_state,
                attempt=run.memory.attempt,
                writes=ranks.is_main,
            )
            _loop(run, watch, saves, first, log_state)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # outside a gradient pass, which takes cheaper policies by itself
        reason = memory_reason(error)
        raise FluxfastError(f"the GPU's memory is full: {reason}", hint=CURE) from None
    finally:
        lift_limit(device)
    if ranks.is_main:
        step, path = saves.publish()
        report = ""
        with keep_running("report.html"):
            report = f", the report {write_report(config.run_dir)}"
        log.info(f"{step} steps done; the LoRA is {path}{report}")
    return lora_file(config, config.run_dir)


def _build(
    config: Config, prepared: Prepared, loader: Loader, device: torch.device, ranks: Ranks
) -> Training:
    """Plan the run and load it; where the system pins less than planned, once more without."""
    host = None
    while True:
        plan = plan_run(config, prepared.model, bucket_shapes(loader), device, host)
        for line in run_lines(plan, device.type == "cuda") if plan else []:
            log.info(line)
        try:
            return build(config, prepared.model, loader, device, plan, ranks)
        except PinRefused as error:
            if host is not None:
                raise
            log.warning(f"note: {error.message}; the run is planned again without it")
        host = 0
        gc.collect()  # frees what was loaded


def _loop(run: Training, watch: Watch, saves: Saves, first: int, log_state: dict | None) -> None:
    """Take steps first + 1 to the last. log_state: a resumed run's, of its log and watch."""
    config, ranks = run.config, run.ranks
    steps, accumulation = config.train.steps, config.train.gradient_accumulation
    every = config.save.every
    batches = run.loader.iterate(first * accumulation, steps * accumulation)
    set_mode(run.optimizer, training=True)
    spill = SpillWatch(lambda: run.device.type == "cuda" and card_is_full(run.device))

    def check_speed(seconds: float | None) -> None:
        """Raises MemorySpills where this logging interval is one slow interval too many."""
        expected, changed = run.memory.take_expected()
        if changed:
            spill.restart()
        elif seconds is not None:
            spill.interval(seconds, expected)

    run_log = RunLog(
        config.run_dir,
        first,
        steps,
        config.log_every,
        run.device,
        check_speed,
        log_state,
        config.train.max_bad_steps,
        writes=ranks.is_main,
    )
    if watch.due(first):
        _look(run, watch, first)
    if first < steps:
        run.memory.capture()

    def state(done: int) -> dict:
        return {**run_log.state(), **watch.state(done)}

    with run_log, stop_on_signals() as stop, _save_on_error(run, saves, state):
        for step in range(first, steps):
            window = [next(batches) for _ in range(accumulation)]
            loss, norm, bad, lr = train_step(run, window, step)
            run.done = done = step + 1
            epoch = step * accumulation // run.loader.batches_per_epoch
            run_log.step(done, loss, norm, bad, lr, epoch)
            stopping = ranks.any(stop.is_set()) and done < steps
            if stopping or done == steps:
                saves.save(run, done, state(done))
            elif every and done % every == 0:
                saves.try_to_save(run, done, state(done), retry_at=min(done + every, steps))
            if stopping:
                ranks.barrier()  # until it is saved, and GPUs are done with what they still sum
                raise Stopped(done, steps)
            if watch.due(done):
                with run_log.pause():
                    _look(run, watch, done)


@contextmanager
def _save_on_error(run: Training, saves: Saves, state: Callable[[int], dict]) -> Iterator[None]:
    """Save what was trained where memory runs out or spills, the cache is damaged or another rank
    is lost, unless an optimizer step was cut short. state: of the log, after so many steps.
    """
    try:
        yield
    except NotFinite as error:
        raise _explained(error, run, saves, state) from None
    except (RuntimeError, FluxfastError) as error:
        sound = isinstance(error, MemorySpills | MemoryExhausted | CacheDamaged)
        sound = sound or is_out_of_memory(error)
        # a GPU that waits for the lost rank cannot be read any more
        sound = sound or (isinstance(error, LostRank) and run.device.type == "cpu")
        if sound and not run.updating and run.done:
            run.graphs.drop()
            saves.try_to_save(run, run.done, state(run.done))
        raise


def _explained(
    error: NotFinite, run: Training, saves: Saves, state: Callable[[int], dict]
) -> FluxfastError:
    """Returns the error with the first bad step's diagnosis, which RUN/diagnosis.txt gets too.

    Saves the state after the last good step unless that is saved or the optimizer moved it since.
    """
    diagnoses = run.ranks.all_gather_json(diagnose(run, error.first))
    lines = list(dict.fromkeys(line for lines in diagnoses for line in lines)) or [
        f"step {error.first}: repeated sample by sample and without graphs, everything is finite"
    ]
    if run.ranks.is_main:
        text = "".join(f"{line}\n" for line in lines)
        write_atomic(run.config.run_dir / "diagnosis.txt", text.encode())
    saved = saves.newest[0] if saves.newest else 0
    if error.good > saved and skips_exactly(run.optimizer, run.device):
        with suppress(FluxfastError):  # weights that are not finite, which the lines report
            saves.try_to_save(run, error.good, {**state(error.good), "bad": 0})
    return FluxfastError(
        f"{error.message}: {'; '.join(lines)}",
        hint="remove the picture, lower train.lr, or set model.compute to fp32; the same command "
        "then goes on from the last good step",
    )


def _look(run: Training, watch: Watch, done: int) -> None:
    """Evaluate the weights that would be saved, and save the best; ranks above 0 wait."""
    if run.ranks.is_main:
        again = done < run.config.train.steps
        with eval_weights(run.optimizer), run.memory.looking(again):
            set_assisted(run.model, False)
            row = watch.look(done)
            set_assisted(run.model, True)
            if row is not None:
                with keep_running(f"the best step's file, of step {done}"):
                    save_best(run, done, row.loss)
    run.ranks.barrier()
