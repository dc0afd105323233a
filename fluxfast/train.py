"""train(config): prepare, plan, build, resume, loop. The step itself: `step.py`."""

import os
import shutil
import signal
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from fluxfast import __version__
from fluxfast.ahead import Ahead
from fluxfast.checkpoint import (
    checkpoints,
    drop_partials,
    identity_of,
    load_checkpoint,
    save_checkpoint,
)
from fluxfast.config import Config, dump_config
from fluxfast.data.loader import Batch, Loader
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.files import CHECK_FILE, sole_user, write_atomic
from fluxfast.formats.lora import save_lora
from fluxfast.load import load_transformer, resolve_device
from fluxfast.memory.plan import Plan
from fluxfast.memory.runtime import CURE, MemoryRuntime
from fluxfast.memory.spill import MemorySpills, SpillWatch, card_is_full
from fluxfast.memory.work import Shape
from fluxfast.metrics import RunLog, say
from fluxfast.model.flux import Flux
from fluxfast.model.lora import inject_lora, lora_layers
from fluxfast.model.precision import linears, multiplies_in_8_bits
from fluxfast.optim import Ema, build_optimizer, flat_gradients, set_mode
from fluxfast.planning import plan_run, run_lines
from fluxfast.prepare import check_model, prepare
from fluxfast.report import write_report
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
        with sole_user(config.run_dir):
            _move_aside(config.run_dir, console)
    with sole_user(config.run_dir):
        return _train(config, console)


def _train(config: Config, console: Console) -> Path:
    drop_partials(config.run_dir)
    device = resolve_device(config.device)
    prepared = prepare(config, device, console)
    loader = Loader(
        prepared.dataset, config.train.batch_size, config.seed, pin=device.type == "cuda"
    )
    plan = plan_run(config, prepared.base, bucket_shapes(loader), device)
    for line in run_lines(plan) if plan else []:
        say(console, line)
    run = build(config, prepared.base, loader, device, console, plan)
    _check_fits(run.model, loader.batch(0))
    first = _resume(run, console)
    write_atomic(
        config.run_dir / "config.yaml",
        dump_config(config).encode(),
    )
    if first < config.train.steps:
        try:
            watch = Watch(config, run.model, prepared, device, console)
            _loop(run, loader, watch, first, console)
        except torch.OutOfMemoryError as error:
            # not in a gradient pass, which takes leaner policies and goes on
            first_line = str(error).splitlines()[0]
            raise FluxfastError(f"the GPU's memory is full: {first_line}", hint=CURE) from None
    return _finish(run, console)


def bucket_labels(loader: Loader) -> dict[int, str]:
    """Image tokens of a sample -> the name of the buckets of so many: the first one's size."""
    labels: dict[int, str] = {}
    for (width, height), (rows, columns) in sorted(loader.latent_sizes.items()):
        labels.setdefault((rows // 2) * (columns // 2), f"{width}x{height}")
    return labels


def bucket_shapes(loader: Loader) -> dict[str, Shape]:
    """Label -> batch shape."""
    labels = bucket_labels(loader)
    return {
        label: Shape(loader.batch_size, tokens, loader.text_length)
        for tokens, label in labels.items()
    }


def build(
    config: Config,
    base: Path,
    loader: Loader,
    device: torch.device,
    console: Console,
    plan: Plan | None = None,
) -> Training:
    """The frozen model with its LoRA, and everything that trains it as planned."""
    with console.status("loading the transformer"):
        model = load_transformer(
            base,
            config.model.storage,
            config.model.compute,
            device,
            layers=config.model.layers,
            double_quant=config.model.double_quant,
            announce=lambda line: say(console, f"note: {line}"),
        )
    lora = config.lora
    parameters = inject_lora(
        model,
        lora.rank,
        lora.alpha,
        lora.targets,
        include=lora.include,
        exclude=lora.exclude,
        share_a=lora.share_a,
        dropout=lora.dropout,
        seed=config.seed,
    )
    if lora.dropout:
        say(console, "note: LoRA dropout takes the path that is not fused: slower, more memory")
    model.train()
    trained = sum(p.numel() for p in parameters)
    say(
        console,
        f"{len(lora_layers(model))} layers carry a LoRA of rank {lora.rank}: "
        f"{trained / 1e6:.2f} M parameters; {model.img_in.weight.device}, {_precision(model)}",
    )
    ema = Ema(parameters, config.train.ema.decay) if config.train.ema.enabled else None
    optimizer = build_optimizer(config.train, parameters)
    labels, policies = bucket_labels(loader), _policies(config, model, loader, plan)

    def announce(line: str) -> None:
        say(console, f"note: {line}")

    memory = MemoryRuntime(model, plan, policies, device, announce)
    memory.attach(optimizer)
    run = Training(
        config, device, model, parameters, flat_gradients(parameters), optimizer, ema, memory,
        labels, loader, announce,
    )  # fmt: skip
    if _forms_ahead(config, model, plan):
        run.ahead = Ahead(model, loader, config, device)
    return run


def _policies(
    config: Config, model: Flux, loader: Loader, plan: Plan | None
) -> dict[str, tuple[str, ...]]:
    """Bucket -> policy per block: the plan's, else the configured one for all."""
    if plan is not None:
        return {label: bucket.choice.policies for label, bucket in plan.buckets.items()}
    memory = config.memory
    if (
        memory.policy == "offload"
        or memory.modulation == "host"
        or memory.optimizer_state == "host"
    ):
        raise ConfigError(
            "memory: what goes to the host is planned, and on a CPU there is no plan",
            hint="set memory.limit_gib to try one",
        )
    word = "keep" if memory.policy == "auto" else memory.policy
    return {label: (word,) * len(model.policies) for label in bucket_labels(loader).values()}


def _forms_ahead(config: Config, model: Flux, plan: Plan | None) -> bool:
    if plan is not None:
        return plan.modulation != "in_place"
    trained = any(layer.trains() for layer in model.modulation_linears())
    if trained and config.memory.modulation == "ahead":
        raise ConfigError(
            "memory.modulation: ahead needs frozen modulation, and lora.targets: all trains it"
        )
    return not trained and config.memory.modulation != "in_place"


def _precision(model: Flux) -> str:
    """Such as: base in nf4, int8 products, activations in bf16, 3 layers rotated, 2 in bf16."""
    layers = {name: model.get_submodule(name) for name in linears(model.spec)}
    blocks = [layer for name, layer in layers.items() if multiplies_in_8_bits(name)]
    coded = [layer for layer in blocks if layer.products]
    stored = Counter(layer.storage() for layer in coded or blocks).most_common(1)[0][0]
    dtype = "fp32" if model.compute_dtype == torch.float32 else "bf16"
    if not coded:
        return f"base in {stored}, computed in {dtype}"
    line = f"base in {stored}, {coded[0].products} products, activations in {dtype}"
    rotated = sum(layer.rotation > 0 for layer in layers.values())
    line += f", {rotated} {'layer' if rotated == 1 else 'layers'} rotated" if rotated else ""
    dense = [layer for layer in blocks if not layer.products]
    return line + (f", {len(dense)} in {dense[0].storage()}" if dense else "")


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
    spill = SpillWatch(lambda: run.device.type == "cuda" and card_is_full(run.device))

    def judge(seconds: float | None) -> None:
        expected = run.memory.take_expected()
        if seconds is not None:
            spill.interval(seconds, expected)

    log = RunLog(config.run_dir, first, train.steps, config.log_every, run.device, console, judge)
    if first == 0:
        _look(run, watch, 0)
    run.capture()
    with log, _stop_on_interrupt() as stop:
        for step in range(first, train.steps):
            loss, norm, bad, lr = train_step(
                run, [next(batches) for _ in range(accumulation)], step
            )
            done, epoch = step + 1, step * accumulation // loader.batches_per_epoch
            try:
                log.step(done, loss, norm, bad, lr, epoch)
            except MemorySpills:
                _save(run, done)
                raise
            due = config.save.every and done % config.save.every == 0
            if due or done == train.steps or stop.is_set():
                _save(run, done)
            if watch.due(done):
                with log.pause():
                    _look(run, watch, done)
            if stop.is_set() and done < train.steps:
                raise KeyboardInterrupt


def _look(run: Training, watch: Watch, done: int) -> None:
    """Validation and previews, with the weights that would be saved; the best ones are."""
    set_mode(run.optimizer, training=False)
    with run.without_graphs():
        row = watch.look(done)
    if row is not None:
        meta = {**_metadata(run, done), "validation_loss": f"{row.loss:.6f}"}
        path = run.config.run_dir / f"{run.config.name}_best.safetensors"
        save_lora(run.model, path, dtype=run.config.save.dtype, metadata=meta)
    set_mode(run.optimizer, training=True)


@contextmanager
def _stop_on_interrupt():
    """Ctrl-C asks the loop to stop after its step; a second one stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(signum, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


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
    dtype = config.save.dtype
    path = folder / f"{config.name}.safetensors"
    save_lora(run.model, path, dtype=dtype, metadata=meta)
    if run.ema:
        pairs = zip(run.ema.average[::2], run.ema.average[1::2], strict=True)
        tensors = dict(zip(lora_layers(run.model), pairs, strict=True))
        file = folder / f"{config.name}_ema.safetensors"
        save_lora(
            run.model,
            file,
            dtype=dtype,
            metadata={**meta, "ema": str(run.ema.decay)},
            tensors=tensors,
        )
    return path


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
