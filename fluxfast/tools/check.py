"""`fluxfast check`: which layers bear 8-bit products on the configured data, which are better
rotated, and which are to stay in bf16.

A few of the run's own batches go forward and backward through the model with dense products; every
linear that would multiply in 8 bits gives some rows of its input x and of its output's gradient dY.
`layer_errors.py` measures and chooses on these. The same batches with 8-bit products tell how far
the LoRA's gradients turn.
"""

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from fluxfast import __version__, rng
from fluxfast.config.schema import Config
from fluxfast.config.yaml_io import dump_yaml
from fluxfast.data.loader import Loader
from fluxfast.data.prepare import prepare, resolve_parts
from fluxfast.data.store import Dataset
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base.load import ResolvedModel, load_resolved, resolve_device
from fluxfast.formats.base.reader import open_base
from fluxfast.model.flux import Flux
from fluxfast.model.lora import inject_lora, lora_layers
from fluxfast.model.precision import (
    DTYPES,
    IN_8_BITS,
    layer_precisions,
    multiplies_in_8_bits,
)
from fluxfast.objective import Batch, noise_batch, sample_losses
from fluxfast.run.checkpoint import newest_checkpoint, put_weights, read_state
from fluxfast.run.resume import SHAPING, changes
from fluxfast.tools.layer_errors import LIMITS, Measured, measure, table
from fluxfast.util.files import CHECK_FILE, exclusive_lock, write_atomic
from fluxfast.util.terminal import progress_bars, spinner

log = logging.getLogger(__name__)

ROWS = 256  # of a layer, over all batches
FRESH_B = 0.01  # deviation of B in a LoRA that was never trained: B = 0 would make dA 0


@dataclass(frozen=True)
class Setting:
    """What is measured where."""

    config: Config
    model: ResolvedModel
    device: torch.device


def check(config: Config, limit: float | None = None, batches: int = 4) -> list[Measured]:
    """Measure every layer that would multiply in 8 bits, write RUN_DIR/check.yaml. -> the layers.

    limit: relative error, default `LIMITS`. The LoRA is that of the run's newest checkpoint, or a
    fresh one. Raises FluxfastError as training does, ConfigError where compute is not in 8 bits.
    """
    device = resolve_device(config.device)
    parts = resolve_parts(config.model, device)
    matmul = parts.model.matmul
    if matmul not in IN_8_BITS:
        raise ConfigError(
            f"compute is {matmul}: there are no 8-bit products to check",
            hint="--set model.compute=int8 (or fp8)",
        )
    setting = Setting(config, parts.model, device)
    with exclusive_lock(config.run_dir):
        try:
            prepared = prepare(config, device, parts=parts)
            limit = LIMITS[matmul] if limit is None else limit
            return _check(setting, prepared.dataset, limit, batches)
        except torch.OutOfMemoryError as error:
            raise FluxfastError(
                f"the GPU's memory is full: {str(error).splitlines()[0]}",
                hint="--set train.batch_size=1, or a lower data.resolution",
            ) from None


def _check(setting: Setting, dataset: Dataset, limit: float, count: int) -> list[Measured]:
    config, model = setting.config, setting.model
    storage, matmul, dtype = model.storage, model.matmul, DTYPES[model.activations]
    loader = Loader(dataset, config.train.batch_size, config.seed)
    layers = []
    # a choice made for a layer is no reason not to measure it
    names = [n for n, p in model.precisions.items() if p.matmul or multiplies_in_8_bits(n)]
    rows, cosines, step = _run_model(setting, names, loader, count)
    plain = layer_precisions(model.spec, storage, matmul, dict.fromkeys(names, "8bit"))
    bars = _progress("measuring layers", len(names))
    with open_base(model.path) as base, bars as advance:
        for name in names:
            tensors = _finite(name, base.read(f"{name}.weight"), *rows.pop(name))
            weight, x, dy = (
                None if tensor is None else tensor.to(setting.device, torch.float32)
                for tensor in tensors
            )
            how = (plain[name], limit, dtype, config.model.double_quant)
            layer = measure(name, model.spec, cast(Tensor, weight), cast(Tensor, x), dy, *how)
            layers.append(replace(layer, cosine=cosines.get(name)))
            advance()
    conditions = (
        f"fluxfast {__version__}: {matmul} products, base in {storage}, limit {limit:g}, "
        f"{count} batches of {config.train.batch_size}, LoRA of step {step}"
    )
    _write(setting, layers, conditions)
    return layers


def _finite(name: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Weight, x and dy as they are. FluxfastError where they are no numbers to measure on."""
    for what, tensor in zip(("weight", "input", "gradient"), tensors, strict=True):
        if tensor is not None and not tensor.isfinite().all():
            raise FluxfastError(
                f"NaN or infinity in the {what} of {name}: nothing can be measured on it",
                hint="the LoRA or the base is broken; --set name=NEW measures a fresh LoRA",
            )
    return tensors


# ---------------------------------------------------------------- the model's passes


def _run_model(
    setting: Setting, names: list[str], loader: Loader, count: int
) -> tuple[dict[str, tuple[Tensor, Tensor | None]], dict[str, float], int]:
    """-> rows of x and dY of the layers `names`, the gradients' cosine of the layers with a LoRA,
    and the step that the LoRA is of.
    """
    config = setting.config
    # stored as configured, multiplied in the activations' dtype, no layer rotated
    spec, storage, dense = setting.model.spec, setting.model.storage, setting.model.activations
    precisions = layer_precisions(spec, storage, dense)
    with spinner("loading the transformer"):
        model = load_resolved(
            replace(setting.model, matmul=dense, precisions=precisions),
            setting.device,
            double_quant=config.model.double_quant,
        )
    parameters = inject_lora(
        model, **config.lora.model_dump(exclude={"init_from"}), seed=config.seed
    )
    step = _set_lora(setting, model, parameters)
    # with hooks the model keeps more than with fused ops, so it always computes blocks twice
    model.policies = ["checkpoint"] * len(model.policies)
    model.train()
    layers = {name: model.linear(name) for name in names}
    capture = _Capture(config.seed, max(1, ROWS // count))
    run = (setting, model, loader, count, capture)
    with _progress("running batches", 2 * count) as advance:
        hooks = [layer.register_forward_hook(capture.hook(name)) for name, layer in layers.items()]
        true = _gradients(*run, advance)
        for hook, layer in zip(hooks, layers.values(), strict=True):
            hook.remove()
            layer.matmul = setting.model.matmul
        coded = _gradients(*run, advance)
    return capture.rows(), {name: _cosine(true[name], coded[name]) for name in true}, step


def _set_lora(setting: Setting, model: Flux, parameters: list[nn.Parameter]) -> int:
    """The newest checkpoint's, or a fresh one with a small B. -> its step."""
    config = setting.config
    try:
        found = newest_checkpoint(config.run_dir)
        if found is not None:
            step, folder = found
            state = read_state(folder)
            if changed := changes(state["config"], config, SHAPING):
                raise FluxfastError(f"{folder} is of other settings: {', '.join(changed)}")
            put_weights(parameters, state, folder)
            log.info(f"the LoRA is that of step {step}")
            return step
    except FluxfastError as error:
        log.warning(f"note: a fresh LoRA is measured: {error.message}")
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            stream, shape = f"check/{name}.lora_B", tuple(layer.trained.lora_B.shape)
            drawn = rng.normal(config.seed, stream, 0, shape, setting.device)[0]
            layer.trained.lora_B.copy_(FRESH_B * drawn)
    return 0


def _gradients(
    setting: Setting,
    model: Flux,
    loader: Loader,
    count: int,
    capture: "_Capture",
    advance: Callable[[], None],
) -> dict[str, Tensor]:
    """BFL name -> dA and dB of all batches, flat, fp32 on the CPU."""
    model.zero_grad(set_to_none=True)
    for index in range(count):
        capture.batch = index
        _loss(setting, model, loader.batch(index)).backward()
        advance()
    return {
        name: torch.cat([cast(Tensor, p.grad).flatten() for p in layer.trained.parameters()]).cpu()
        for name, layer in lora_layers(model).items()
    }


def _loss(setting: Setting, model: Flux, batch: Batch) -> Tensor:
    """A batch's mean loss, at training's own random numbers."""
    train = setting.config.train
    drawn = setting.config.seed, train.timesteps, train.timestep_bias
    inputs = noise_batch(batch, *drawn, device=setting.device)
    model.dropout_clock.indices = batch.indices
    return sample_losses(model, inputs, train.guidance).mean()


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return (a @ b / (a.norm() * b.norm())).item()


class _Capture:
    """Collects rows of x and dY of layers: the same tokens of both, fp32 on the CPU."""

    def __init__(self, seed: int, count: int):
        self.seed, self.count = seed, count  # rows of a layer and batch
        self.batch = 0
        self._x: dict[str, list[Tensor]] = {}
        self._dy: dict[str, list[Tensor]] = {}
        self._seen: set[tuple[str, int]] = set()

    def hook(self, name: str) -> Callable:
        """A forward hook of the layer `name`."""

        def see(_: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
            if (name, self.batch) in self._seen:
                return  # the block is computed again, for its backward
            self._seen.add((name, self.batch))
            (x,) = inputs
            flat = x.detach().flatten(0, -2)
            order = rng.permutation(self.seed, f"check/{name}", self.batch, len(flat))
            tokens = torch.tensor(order[: self.count], device=x.device)
            self._x.setdefault(name, []).append(flat[tokens].float().cpu())
            if x.requires_grad:  # else there is no dx to get wrong
                rows = self._dy.setdefault(name, [])
                y.register_hook(lambda dy: rows.append(dy.flatten(0, -2)[tokens].float().cpu()))

        return see

    def rows(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        return {
            name: (torch.cat(x), torch.cat(self._dy[name]) if self._dy.get(name) else None)
            for name, x in self._x.items()
        }


# ---------------------------------------------------------------- what comes of it


@contextmanager
def _progress(what: str, total: int):
    """Gives a function to call after each of `total` things; a bar where there is a terminal."""
    bars = progress_bars(transient=True)
    if bars.disable:
        log.info(f"{what}: {total}")
    with bars:
        task = bars.add_task(what, total=total)
        yield lambda: bars.advance(task)


def _write(setting: Setting, layers: list[Measured], conditions: str) -> None:
    """check.yaml, and the words about it."""
    config = setting.config
    wanted = _merged(setting, {layer.name: layer.choice for layer in layers})
    path = config.run_dir / CHECK_FILE
    comments = [conditions, "relative errors; see `fluxfast check --help`", "", *table(layers)]
    text = "".join(f"# {line}".rstrip() + "\n" for line in comments)
    write_atomic(path, (text + dump_yaml({"layers": wanted})).encode())
    beyond = [
        layer.name
        for layer in layers
        if layer.choice == "rotate" and layer.rotated and layer.rotated.worst > layer.bound
    ]
    if beyond:
        log.warning(
            f"note: rotated, and still above the limit: {', '.join(beyond)}. bf16 in their place "
            f"in {path} leaves no such error, for memory and time",
        )
    counts = Counter(layer.choice for layer in layers)
    log.info(
        f"{counts['8bit']} layers in plain {setting.model.matmul}, {counts['rotate']} rotated, "
        f"{counts['bf16']} in bf16; train so with --set model.layers={path}",
    )


def _merged(setting: Setting, choices: dict[str, str]) -> dict[str, str]:
    """What the configuration says of single layers, then the layers that came out otherwise, so
    that the file stands alone.
    """
    given, now = setting.config.model.layers, setting.model.precisions
    spec, storage, matmul = setting.model.spec, setting.model.storage, setting.model.matmul
    then = layer_precisions(spec, storage, matmul, choices)
    changed = {name: choice for name, choice in choices.items() if now[name] != then[name]}
    return {name: choice for name, choice in given.items() if name not in changed} | changed
