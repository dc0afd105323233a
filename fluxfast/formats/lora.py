"""LoRA files in diffusers' form, as ai-toolkit writes them too: `transformer.….lora_A.weight`,
split by part.

alpha is folded into B (diffusers drops an alpha it is not asked for), so a file always means scale
1.
"""

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fluxfast.errors import FluxfastError
from fluxfast.files import write_atomic
from fluxfast.model.flux import Flux
from fluxfast.model.lora import lora_layers
from fluxfast.model.names import block_linears, diffusers_parts, part_rows

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PREFIX = "transformer."


def lora_state(
    model: Flux, tensors: dict[str, tuple[Tensor, Tensor]] | None = None
) -> dict[str, Tensor]:
    """diffusers key -> fp32 tensor, alpha folded into B, one A and B per trained part.

    tensors: BFL name -> (A, B) to write instead of the model's own (an average of them, say).
    """
    state = {}
    for name, layer in lora_layers(model).items():
        a, b = (tensors or {}).get(name, (layer.lora_A, layer.lora_B))
        parts = dict(zip(part_rows(name, model.spec), diffusers_parts(name), strict=True))
        for y_rows, b_rows, a_rows in layer.lora_slices():
            part = parts[(y_rows.start, y_rows.stop)]
            state[f"{_PREFIX}{part}.lora_A.weight"] = a[a_rows].detach().float().cpu()
            state[f"{_PREFIX}{part}.lora_B.weight"] = (
                b[b_rows].detach().float().cpu() * layer.lora_scale
            )
    return state


def save_lora(
    model: Flux,
    path: Path | str,
    format: str = "diffusers",
    *,
    dtype: str = "fp32",
    metadata: dict[str, str] | None = None,
    tensors: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> Path:
    """Write the model's LoRA, whole or not at all (a temporary file beside it, then a rename).

    dtype: fp32, fp16 or bf16; a tensor that fp16 cannot hold makes the whole file fp32.
    Raises FluxfastError where there is no LoRA or the disk refuses.
    """
    if format != "diffusers":
        raise FluxfastError(f"LoRA format {format!r} is not one of diffusers")
    state = lora_state(model, tensors)
    if not state:
        raise FluxfastError("the model carries no LoRA to save")
    # clones: a shared A stands under several names, which safetensors refuses for one storage
    cast = {key: tensor.to(DTYPES[dtype]).clone() for key, tensor in state.items()}
    if not all(tensor.isfinite().all() for tensor in cast.values()):
        cast = {key: tensor.clone() for key, tensor in state.items()}
    write_atomic(Path(path), save(cast, {"format": "pt", **(metadata or {})}))
    return Path(path)


def load_lora(model: Flux, path: Path | str, strength: float = 1.0) -> list[torch.nn.Parameter]:
    """Put the LoRA of a diffusers-form file on `model`, in place of one it may carry. -> its
    parameters.

    Ranks may differ between modules. An `.alpha` beside a module is honoured (scale = alpha /
    rank). Raises FluxfastError for an unreadable file, another format, or modules that this model
    does not have.
    """
    try:
        with safe_open(Path(path), framework="pt") as file:
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FluxfastError(f"cannot read the LoRA {path}: {error}") from None
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        module, _, kind = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        pairs[module][kind] = tensor

    for layer in lora_layers(model).values():
        layer.lora_A = layer.lora_B = None
    parameters = []
    for name in block_linears(model.spec):
        rows = dict(zip(diffusers_parts(name), part_rows(name, model.spec), strict=True))
        found = {part: pairs.pop(part) for part in rows if part in pairs}
        if found:
            parameters += _put(model, name, rows, found, strength, path)
    if pairs or not parameters:
        raise FluxfastError(
            f"{path} is not a LoRA for this model in diffusers' form: "
            + (
                f"it has modules such as {next(iter(pairs))!r}"
                if pairs
                else "it names no module of it"
            )
        )
    return parameters


def _put(model, name, rows, found, strength, path) -> list[torch.nn.Parameter]:
    layer = model.get_submodule(name)
    for part, pair in found.items():
        a, b = pair.get("lora_A"), pair.get("lora_B")
        height = rows[part][1] - rows[part][0]
        if (
            a is None
            or b is None
            or tuple(a.shape) != (b.shape[1], layer.in_features)
            or b.shape[0] != height
        ):
            raise FluxfastError(f"{path}: lora_A and lora_B of {part} do not fit this model")
    rank = max(pair["lora_A"].shape[0] for pair in found.values())
    parameters = layer.add_lora(rank, rank, [[rows[part]] for part in found])
    with torch.no_grad():
        for (_, b_rows, a_rows), pair in zip(layer.lora_slices(), found.values(), strict=True):
            a, b = pair["lora_A"], pair["lora_B"]
            own = a.shape[0]
            scale = float(pair["alpha"]) / own if "alpha" in pair else 1.0
            layer.lora_A[a_rows].zero_()[:own] = a
            layer.lora_B[b_rows].zero_()[:, :own] = b * scale
    layer.lora_strength = strength
    return parameters
