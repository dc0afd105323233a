"""A small FLUX, images and configurations for tests. Imports with torch, triton and numpy alone."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from fluxfast.model.flux import Flux
from fluxfast.model.init import fill
from fluxfast.model.lora import lora_layers
from fluxfast.model.names import linear_shape
from fluxfast.model.precision import activation_dtype, layer_precisions
from fluxfast.model.spec import FluxSpec, rope_axes

if TYPE_CHECKING:
    from fluxfast.config.schema import Config

# hidden 64: the blocks' K are 64, 256 and 320, all of which nf4 takes
SMALL = FluxSpec(
    in_channels=16,
    vec_in_dim=20,
    context_in_dim=24,
    hidden_size=64,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=rope_axes(32),
)


def noise_pictures(
    folder: Path,
    count: int,
    caption: str = "",
    seed: int = 0,
    sizes: tuple[tuple[int, int], ...] = ((64, 64),),
) -> Path:
    """Saves `count` images of noise, 0.png, 1.png and so on, of each (width, height) in turn, with
    captions if one is given. Returns the folder."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for i in range(count):
        width, height = sizes[i % len(sizes)]
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        if caption:
            (folder / f"{i}.txt").write_text(f"{caption} {i}")
    return folder


def random_flux(
    spec: FluxSpec,
    storage: str = "fp32",
    compute: str = "fp32",
    device: str | torch.device = "cpu",
    seed: int = 0,
    *,
    activations: str = "auto",
    layers: Mapping[str, str] | None = None,
) -> Flux:
    """Returns a Flux with random weights made on the device.

    Arguments as for `load_transformer`, with neither storage nor compute `auto`.
    """
    generator = torch.Generator(device).manual_seed(seed)
    model = Flux(spec, activation_dtype(compute, activations, torch.device(device)))
    precisions = layer_precisions(spec, storage, compute, layers)
    fill(model, lambda name: random_tensor(name, spec, generator), precisions, device=device)
    return model


def random_tensor(name: str, spec: FluxSpec, generator: torch.Generator) -> torch.Tensor:
    """Returns a tensor of the model by its BFL name, made on the generator's device: matrices
    N(0, 1/K), biases N(0, 0.02²), norm scales 1 + N(0, 0.02²).
    """
    module, _, kind = name.rpartition(".")
    if kind == "scale":
        shape, mean, std = (spec.head_dim,), 1.0, 0.02
    elif kind == "bias":
        shape, mean, std = linear_shape(module, spec)[:1], 0.0, 0.02
    else:
        shape = linear_shape(module, spec)
        mean, std = 0.0, shape[1] ** -0.5
    tensor = torch.randn(shape, generator=generator, device=generator.device)
    return tensor.mul_(std).add_(mean)


def inputs(spec: FluxSpec, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Returns random arguments for Flux.forward: 6 image tokens, 4 text tokens."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 6, spec.in_channels, generator=g),
        torch.arange(18.0).view(1, 6, 3),
        torch.randn(batch, 4, spec.context_in_dim, generator=g),
        torch.zeros(1, 4, 3),
        torch.rand(batch, generator=g),
        torch.randn(batch, spec.vec_in_dim, generator=g),
        torch.ones(batch),
    )


def randomize(model: torch.nn.Module, seed: int = 1, std: float = 0.1) -> None:
    """Sets every lora_B to random numbers, so that the LoRA changes the output."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=g) * std)


def diffusers_forward(transformer, x: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Calls diffusers' transformer with the arguments of Flux.forward."""
    img, img_ids, txt, txt_ids, timesteps, y, guidance = x
    with torch.no_grad():
        return transformer(
            hidden_states=img,
            encoder_hidden_states=txt,
            pooled_projections=y,
            timestep=timesteps,
            img_ids=img_ids[0],
            txt_ids=txt_ids[0],
            guidance=guidance,
        ).sample


def small_run(model: Path, photos: Path, output: Path, cache: Path, **changes) -> Config:
    """Returns a short run's configuration, with changes such as train__steps=2."""
    from fluxfast.config.schema import build_config

    raw = {
        "name": "small",
        "output_dir": str(output),
        "cache_dir": str(cache),
        "trigger": "ohwx",
        "log_every": 2,
        "device": "cpu",
        "model": {"path": str(model), "storage": "fp32", "compute": "fp32"},
        "lora": {"rank": 2},
        "data": {"folder": str(photos), "resolution": 64},
        "train": {"steps": 4, "batch_size": 2, "lr": 1e-3},
        "save": {"every": 2, "dtype": "fp32"},
    }
    sets = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    return build_config(raw, sets)


class CommandResult(NamedTuple):
    """What a command did: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line, after checking that there is nothing else of its kind."""
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        assert all(line.startswith("hint: ") for line in lines[lines.index(errors[0]) + 1 :])
        assert "Traceback" not in self.err and self.out == ""
        return errors[0]


@contextmanager
def logged() -> Iterator[list[str]]:
    """Yields a list that collects the lines fluxfast logs, from INFO on."""
    lines, logger = [], logging.getLogger("fluxfast")
    handler, level = logging.Handler(), logger.level
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def script(path: Path) -> ModuleType:
    """Returns a script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
