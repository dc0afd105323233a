"""`fluxfast convert`: converts LoRA files of any format into one file of another."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.container import all_finite
from fluxfast.formats.lora.read import from_tensors, read_all
from fluxfast.formats.lora.update import LoraWeights, balanced, difference, merged, scaled
from fluxfast.formats.lora.write import to_bytes, to_state
from fluxfast.util.files import check_new, write_atomic

log = logging.getLogger(__name__)

# the change that rounding to the file's dtype may make, relative to the layer's largest |ΔW|
_ROUNDING = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}


def convert(
    sources: list[Path],
    format: str,
    target: Path,
    *,
    strengths: Sequence[float] = (),
    scale: float = 1.0,
    dtype: str = "fp32",
    drop: bool = False,
    verify: bool = False,
) -> list[str]:
    """Writes the sum of `sources`, each times its strength, all times scale. Returns, with verify,
    a line per layer with the difference between its ΔW before and after.

    Exact except for the rounding to dtype: files are summed by stacking their ranks. drop leaves
    out, and logs, what the format cannot hold. Raises ConfigError for files that cannot be
    read and a target that is there already, FluxfastError if the disk refuses or verify finds more
    than rounding; then nothing is written.
    """
    target = Path(target)
    check_new(target)
    for number in (*strengths, scale):
        if not math.isfinite(number):
            raise ConfigError(f"a strength or scale of {number} is no number to multiply by")
    loras = read_all(sources, strengths, drop=drop)
    total = scaled(merged(loras), scale)
    for source, lora in zip(sources, loras, strict=True):
        log.info(f"note: {source}: {lora.form}, rank {lora.rank()}, {len(lora.pieces)} linears")
    even = balanced(total) if dtype == "fp16" else total
    state = to_state(even, format, drop=drop, hint="--drop leaves it out")
    if key := next((key for key, tensor in state.items() if not all_finite(tensor)), None):
        raise ConfigError(f"{key} would be larger than fp32 can hold", hint="a smaller --scale")
    metadata = loras[0].metadata if len(loras) == 1 else {}
    metadata = {k: v for k, v in metadata.items() if k not in ("format", "lora_adapter_metadata")}
    content = to_bytes(state, dtype, metadata)
    lines = []
    if verify:
        written = load(content)
        written = _as_older_diffusers(written) if format == "diffusers" else written
        lines = _compare(total, written, target, dtype, drop)
    write_atomic(target, content, hint="free some space, or choose another folder")
    return lines


def _as_older_diffusers(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the factors as diffusers up to 0.39 applies them: alpha is, for all of a network, the
    rank of its first in the file, which is in the order of the keys.
    """
    first: dict[str, int] = {}
    for key in sorted(key for key in content if key.endswith(".lora_B.weight")):
        rank = first.setdefault(key.partition(".")[0], content[key].shape[1])
        content[key] = content[key] * (rank / content[key].shape[1])
    return content


def _compare(
    total: LoraWeights, content: dict[str, Tensor], target: Path, dtype: str, drop: bool
) -> list[str]:
    """Returns a line per layer. What was dropped, which to_state has logged, is not compared."""
    written = from_tensors(content, {}, target)
    before, after = {**total.pieces, **total.text}, {**written.pieces, **written.text}
    lines, worst = [], (0.0, "")
    for module in after if drop else {**before, **after}:
        parts = {part for piece in after[module] for part in piece.parts} if drop else None
        change, size = difference(before.get(module, []), after.get(module, []), parts)
        lines.append(f"{module}  {change:.3g} of {size:.3g}" if change else f"{module}  0")
        share = change / size if 0 < size < math.inf else change
        worst = max(worst, (share, module))
    share, module = worst
    if not share <= _ROUNDING[dtype]:
        raise FluxfastError(
            f"{module} would change by {share:.2g} of its size: nothing is written",
            hint=None if dtype == "fp32" else "--dtype fp32 rounds least",
        )
    where = f"({module})" if share else "in every layer"
    return [*lines, f"max |ΔW difference| relative to the layer: {share:.3g} {where}"]
