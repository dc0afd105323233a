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
from dataclasses import replace
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
from fluxfast.memory.runtime import is_out_of_memory, memory_reason
from fluxfast.model.flux import Flux
from fluxfast.model.lora import inject_lora, lora_layers
from fluxfast.model.precision import (
    DTYPES,
    IN_8_BITS,
    Precision,
    layer_precisions,
    multiplies_in_8_bits,
)
from fluxfast.objective import noise_batch, sample_losses
from fluxfast.run.checkpoint import newest_checkpoint, put_weights, read_state, stored_areas
from fluxfast.run.resume import SHAPING, changes
from fluxfast.tools.layer_errors import LIMITS, Measured, measure, table
from fluxfast.util.files import CHECK_FILE, exclusive_lock, write_atomic
from fluxfast.util.terminal import progress_bars, spinner

log = logging.getLogger(__name__)

ROWS = 256  # of a layer, over all batches
FRESH_B = 0.01  # deviation of B in a LoRA that was never trained: B = 0 would make dA 0


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
            areas = stored_areas(config.run_dir)
            dataset = prepare(config, device, parts=parts, areas=areas).dataset
            return _Check(config, parts.model, device, dataset, batches).run(limit)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise FluxfastError(
                f"the GPU's memory is full: {memory_reason(error)}",
                hint="--set train.batch_size=1, or a lower data.resolution",
            ) from None


class _Check:
    def __init__(
        self,
        config: Config,
        model: ResolvedModel,
        device: torch.device,
        dataset: Dataset,
        batches: int,
    ):
        self.config, self.model, self.device, self.batches = config, model, device, batches
        self.loader = Loader(dataset, config.train.batch_size, config.seed)
        # a layer that model.layers keeps out of 8-bit products is measured nevertheless
        chosen = model.precisions.items()
        self.names = [n for n, p in chosen if p.matmul or multiplies_in_8_bits(n)]
        self.capture = _Capture(config.seed, max(1, ROWS // batches))

    def run(self, limit: float) -> list[Measured]:
        config, model = self.config, self.model
        cosines, step = self._run_model()
        plain = self._precisions(model.matmul, dict.fromkeys(self.names, "8bit"))
        layers = []
        with (
            open_base(model.path) as base,
            _progress("measuring layers", len(self.names)) as advance,
        ):
            for name in self.names:
                tensors = base.read(f"{name}.weight"), *self.capture.pop(name)
                _check_finite(name, *tensors)
                weight, x, dy = (
                    None if tensor is None else tensor.to(self.device, torch.float32)
                    for tensor in tensors
                )
                assert weight is not None and x is not None
                precision = plain[name], limit, DTYPES[model.activations], config.model.double_quant
                layer = measure(name, model.spec, weight, x, dy, *precision)
                layers.append(replace(layer, cosine=cosines.get(name)))
                advance()
        self._write(
            layers,
            f"fluxfast {__version__}: {model.matmul} products, base in {model.storage}, limit "
            f"{limit:g}, {self.batches} batches of {config.train.batch_size}, LoRA of step {step}",
        )
        return layers

    def _precisions(self, matmul: str, choices: dict[str, str]) -> dict[str, Precision]:
        return layer_precisions(self.model.spec, self.model.storage, matmul, choices)

    def _run_model(self) -> tuple[dict[str, float], int]:
        """Captures rows of x and dY. Returns the cosine of the gradients of each layer with a LoRA,
        and the step of the LoRA.
        """
        config, model = self.config, self.model
        # stored as configured, multiplied in the activations' dtype, no layer rotated
        dense = replace(
            model, matmul=model.activations, precisions=self._precisions(model.activations, {})
        )
        with spinner("loading the transformer"):
            flux = load_resolved(dense, self.device, double_quant=config.model.double_quant)
        options = config.lora.model_dump(exclude={"init_from"})
        step = self._set_lora(flux, inject_lora(flux, **options, seed=config.seed))
        # with hooks the model keeps more than with fused ops, so it always computes blocks twice
        flux.policies = ["checkpoint"] * len(flux.policies)
        flux.train()
        layers = {name: flux.linear(name) for name in self.names}
        with _progress("running batches", 2 * self.batches) as advance:
            hooks = [
                layer.register_forward_hook(self.capture.hook(n)) for n, layer in layers.items()
            ]
            true = self._gradients(flux, advance)
            for hook, layer in zip(hooks, layers.values(), strict=True):
                hook.remove()
                layer.matmul = model.matmul
            coded = self._gradients(flux, advance)
        return {name: _cosine(true[name], coded[name]) for name in true}, step

    def _set_lora(self, flux: Flux, parameters: list[nn.Parameter]) -> int:
        """Loads the newest checkpoint's LoRA, else gives the LoRA a small B. Returns its step."""
        config = self.config
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
                normal = rng.normal(config.seed, stream, 0, shape, self.device)[0]
                layer.lora.lora_B.copy_(FRESH_B * normal)
        return 0

    def _gradients(self, flux: Flux, advance: Callable[[], None]) -> dict[str, Tensor]:
        """Returns BFL name -> dA and dB of all batches, flat, fp32 on the CPU."""
        train = self.config.train
        distribution = self.config.seed, train.timesteps, train.timestep_bias  # training's own
        flux.zero_grad(set_to_none=True)
        for index in range(self.batches):
            self.capture.batch = index
            batch = self.loader.batch(index)
            inputs = noise_batch(batch, *distribution, device=self.device)
            flux.dropout_clock.indices = inputs.indices
            sample_losses(flux, inputs, train.guidance).mean().backward()
            advance()
        return {
            name: torch.cat([cast(Tensor, p.grad).flatten() for p in layer.lora.parameters()]).cpu()
            for name, layer in lora_layers(flux).items()
        }

    def _write(self, layers: list[Measured], conditions: str) -> None:
        """Writes check.yaml and logs the counts."""
        choices = {layer.name: layer.choice for layer in layers}
        # the layers that came out differently follow what the configuration says of single layers,
        # so that the file stands alone
        before, after = self.model.precisions, self._precisions(self.model.matmul, choices)
        changed = {name: choice for name, choice in choices.items() if before[name] != after[name]}
        given = self.config.model.layers
        merged = {name: choice for name, choice in given.items() if name not in changed} | changed
        path = self.config.run_dir / CHECK_FILE
        comments = [conditions, "relative errors; see `fluxfast check --help`", "", *table(layers)]
        text = "".join(f"# {line}".rstrip() + "\n" for line in comments)
        write_atomic(path, (text + dump_yaml({"layers": merged})).encode())
        rotated = [(each, each.rotated) for each in layers if each.choice == "rotate"]
        beyond = [each.name for each, errors in rotated if errors and errors.worst > each.bound]
        if beyond:
            log.warning(
                f"note: rotated, and still above the limit: {', '.join(beyond)}. bf16 in their "
                f"place in {path} leaves no such error, for memory and time",
            )
        counts = Counter(choices.values())
        log.info(
            f"{counts['8bit']} layers in plain {self.model.matmul}, {counts['rotate']} rotated, "
            f"{counts['bf16']} in bf16; train so with --set model.layers={path}",
        )


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return (a @ b / (a.norm() * b.norm())).item()


def _check_finite(name: str, *tensors: Tensor | None) -> None:
    for kind, tensor in zip(("weight", "input", "gradient"), tensors, strict=True):
        if tensor is not None and not tensor.isfinite().all():
            raise FluxfastError(
                f"NaN or infinity in the {kind} of {name}: nothing can be measured on it",
                hint="the LoRA or the base is broken; --set name=NEW measures a fresh LoRA",
            )


@contextmanager
def _progress(title: str, total: int):
    """Yields a function to call after each of `total` items; a bar where there is a terminal."""
    bars = progress_bars(transient=True)
    if bars.disable:
        log.info(f"{title}: {total}")
    with bars:
        task = bars.add_task(title, total=total)
        yield lambda: bars.advance(task)


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
