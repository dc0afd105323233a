"""`fluxfast check`: which layers tolerate 8-bit products on the configured data, which need a
rotation, and which should stay in bf16.

A few batches of the run go forward and backward through the model with dense products; of every
linear that would multiply in 8 bits, some rows of its input x and of its output's gradient dY are
kept. `layer_errors.py` measures and chooses on these. The same batches with 8-bit products give
the cosine between the LoRA's gradients.
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
from fluxfast.model.precision import DTYPES, IN_8_BITS, layer_precisions, multiplies_in_8_bits
from fluxfast.objective import noise_batch, sample_losses
from fluxfast.run.checkpoint import newest_checkpoint, put_weights, read_state
from fluxfast.run.resume import SHAPING, changes
from fluxfast.tools.layer_errors import LIMITS, Measured, measure, table
from fluxfast.util.files import CHECK_FILE, exclusive_lock, write_atomic
from fluxfast.util.terminal import progress_bars, spinner

log = logging.getLogger(__name__)

ROWS = 256  # of a layer, over all batches
FRESH_B = 0.01  # deviation of B in a LoRA that was never trained: B = 0 would make dA 0


@dataclass(frozen=True)
class Run:
    """What is measured, and where."""

    config: Config
    model: ResolvedModel
    device: torch.device


def check(config: Config, limit: float | None = None, batches: int = 4) -> list[Measured]:
    """Measures every layer that would multiply in 8 bits, writes RUN_DIR/check.yaml and returns the
    layers.

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
    limit = LIMITS[matmul] if limit is None else limit
    with exclusive_lock(config.run_dir):
        try:
            dataset = prepare(config, device, parts=parts).dataset
            return _check(Run(config, parts.model, device), dataset, limit, batches)
        except torch.OutOfMemoryError as error:
            raise FluxfastError(
                f"the GPU's memory is full: {str(error).splitlines()[0]}",
                hint="--set train.batch_size=1, or a lower data.resolution",
            ) from None


def _check(run: Run, dataset: Dataset, limit: float, count: int) -> list[Measured]:
    config, model = run.config, run.model
    storage, matmul, dtype = model.storage, model.matmul, DTYPES[model.activations]
    loader = Loader(dataset, config.train.batch_size, config.seed)
    # a layer that model.layers keeps out of 8-bit products is measured nevertheless
    names = [n for n, p in model.precisions.items() if p.matmul or multiplies_in_8_bits(n)]
    capture, cosines, step = _run_model(run, names, loader, count)
    plain = layer_precisions(model.spec, storage, matmul, dict.fromkeys(names, "8bit"))
    layers = []
    bars = _progress("measuring layers", len(names))
    with open_base(model.path) as base, bars as advance:
        for name in names:
            tensors = base.read(f"{name}.weight"), *capture.pop(name)
            _check_finite(name, *tensors)
            weight, x, dy = (t if t is None else t.to(run.device, torch.float32) for t in tensors)
            precision = plain[name], limit, dtype, config.model.double_quant
            layer = measure(name, model.spec, cast(Tensor, weight), cast(Tensor, x), dy, *precision)
            layers.append(replace(layer, cosine=cosines.get(name)))
            advance()
    conditions = (
        f"fluxfast {__version__}: {matmul} products, base in {storage}, limit {limit:g}, "
        f"{count} batches of {config.train.batch_size}, LoRA of step {step}"
    )
    _write(run, layers, conditions)
    return layers


def _check_finite(name: str, *tensors: Tensor | None) -> None:
    for kind, tensor in zip(("weight", "input", "gradient"), tensors, strict=True):
        if tensor is not None and not tensor.isfinite().all():
            raise FluxfastError(
                f"NaN or infinity in the {kind} of {name}: nothing can be measured on it",
                hint="the LoRA or the base is broken; --set name=NEW measures a fresh LoRA",
            )


# ---------------------------------------------------------------- the model's passes


def _run_model(
    run: Run, names: list[str], loader: Loader, count: int
) -> tuple["_Capture", dict[str, float], int]:
    """Returns the rows of x and dY of the layers `names`, the cosine of the gradients of each layer
    with a LoRA, and the step of the LoRA.
    """
    config, model = run.config, run.model
    # stored as configured, multiplied in the activations' dtype, no layer rotated
    dense = model.activations
    precisions = layer_precisions(model.spec, model.storage, dense)
    with spinner("loading the transformer"):
        flux = load_resolved(
            replace(model, matmul=dense, precisions=precisions),
            run.device,
            double_quant=config.model.double_quant,
        )
    options = config.lora.model_dump(exclude={"init_from"})
    parameters = inject_lora(flux, **options, seed=config.seed)
    step = _set_lora(run, flux, parameters)
    # with hooks the model keeps more than with fused ops, so it always computes blocks twice
    flux.policies = ["checkpoint"] * len(flux.policies)
    flux.train()
    layers = {name: flux.linear(name) for name in names}
    capture = _Capture(config.seed, max(1, ROWS // count))
    with _progress("running batches", 2 * count) as advance:
        hooks = [layer.register_forward_hook(capture.hook(name)) for name, layer in layers.items()]
        dense_gradients = _gradients(run, flux, loader, count, capture, advance)
        for hook, layer in zip(hooks, layers.values(), strict=True):
            hook.remove()
            layer.matmul = model.matmul
        gradients = _gradients(run, flux, loader, count, capture, advance)
    cosines = {
        name: torch.cosine_similarity(true.double(), gradients[name].double(), dim=0).item()
        for name, true in dense_gradients.items()
    }
    return capture, cosines, step


def _set_lora(run: Run, flux: Flux, parameters: list[nn.Parameter]) -> int:
    """Loads the newest checkpoint's LoRA, else gives the fresh one a small B. Returns its step."""
    config = run.config
    try:
        if newest := newest_checkpoint(config.run_dir):
            step, folder = newest
            state = read_state(folder)
            if changed := changes(state["config"], config, SHAPING):
                raise FluxfastError(f"{folder} is of other settings: {', '.join(changed)}")
            put_weights(parameters, state, folder)
            log.info(f"the LoRA is that of step {step}")
            return step
    except FluxfastError as error:
        log.warning(f"note: a fresh LoRA is measured: {error.message}")
    with torch.no_grad():
        for name, layer in lora_layers(flux).items():
            stream, shape = f"check/{name}.lora_B", tuple(layer.lora.lora_B.shape)
            normal = rng.normal(config.seed, stream, 0, shape, run.device)[0]
            layer.lora.lora_B.copy_(FRESH_B * normal)
    return 0


def _gradients(
    run: Run,
    flux: Flux,
    loader: Loader,
    count: int,
    capture: "_Capture",
    advance: Callable[[], None],
) -> dict[str, Tensor]:
    """Returns BFL name -> dA and dB of all batches, flat, fp32 on the CPU."""
    train, seed = run.config.train, run.config.seed
    flux.zero_grad(set_to_none=True)
    for index in range(count):
        capture.batch = index
        batch = loader.batch(index)
        inputs = noise_batch(  # at training's own random numbers
            batch, seed, train.timesteps, train.timestep_bias, device=run.device
        )
        flux.dropout_clock.indices = batch.indices
        sample_losses(flux, inputs, train.guidance).mean().backward()
        advance()
    return {
        name: torch.cat([cast(Tensor, p.grad).flatten() for p in layer.lora.parameters()]).cpu()
        for name, layer in lora_layers(flux).items()
    }


class _Capture:
    """Collects rows of x and dY of layers: the same tokens of both, fp32 on the CPU."""

    def __init__(self, seed: int, count: int):
        self.seed, self.count = seed, count  # rows of a layer and batch
        self.batch = 0
        self._x: dict[str, list[Tensor]] = {}
        self._dy: dict[str, list[Tensor]] = {}

    def hook(self, name: str) -> Callable:
        """Returns a forward hook of the layer `name`."""
        xs, dys = self._x.setdefault(name, []), self._dy.setdefault(name, [])

        def see(_: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
            if len(xs) > self.batch:
                return  # the block is computed again, for its backward
            (x,) = inputs
            flat = x.detach().flatten(0, -2)
            order = rng.permutation(self.seed, f"check/{name}", self.batch, len(flat))
            tokens = torch.tensor(order[: self.count], device=x.device)
            xs.append(flat[tokens].float().cpu())
            if x.requires_grad:  # else there is no dx to get wrong
                y.register_hook(lambda dy: dys.append(dy.flatten(0, -2)[tokens].float().cpu()))

        return see

    def pop(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Returns the rows of x and dY of one layer, and forgets them."""
        x, dy = self._x.pop(name), self._dy.pop(name)
        return torch.cat(x), torch.cat(dy) if dy else None


# ---------------------------------------------------------------- the result


@contextmanager
def _progress(title: str, total: int):
    """Yields a function to call after each of `total` items; a bar where there is a terminal."""
    bars = progress_bars(transient=True)
    if bars.disable:
        log.info(f"{title}: {total}")
    with bars:
        task = bars.add_task(title, total=total)
        yield lambda: bars.advance(task)


def _write(run: Run, layers: list[Measured], conditions: str) -> None:
    """Writes check.yaml and logs the counts."""
    model, given = run.model, run.config.model.layers
    choices = {layer.name: layer.choice for layer in layers}
    # the layers that came out differently follow what the configuration says of single layers, so
    # that the file stands alone
    chosen = layer_precisions(model.spec, model.storage, model.matmul, choices)
    changed = {n: choice for n, choice in choices.items() if model.precisions[n] != chosen[n]}
    merged = {name: choice for name, choice in given.items() if name not in changed} | changed
    path = run.config.run_dir / CHECK_FILE
    comments = [conditions, "relative errors; see `fluxfast check --help`", "", *table(layers)]
    text = "".join(f"# {line}".rstrip() + "\n" for line in comments)
    write_atomic(path, (text + dump_yaml({"layers": merged})).encode())
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
    counts = Counter(choices.values())
    log.info(
        f"{counts['8bit']} layers in plain {model.matmul}, {counts['rotate']} rotated, "
        f"{counts['bf16']} in bf16; train so with --set model.layers={path}",
    )
