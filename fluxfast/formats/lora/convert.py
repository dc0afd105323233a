"""`fluxfast convert`: LoRA files of any format into one file of another."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.container import all_finite
from fluxfast.formats.lora.read import from_tensors, read_lora
from fluxfast.formats.lora.update import LoraWeights, balanced, difference, merged, scaled
from fluxfast.formats.lora.write import known_format, to_bytes, to_state
from fluxfast.util.files import check_new, write_atomic

log = logging.getLogger(__name__)

# what rounding to the file's dtype may change, as a share of the largest |ΔW| of the layer
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
    """Write the sum of `sources`, each times its strength, all times scale. Returns, with verify, a
    line per layer: what writing changed of its ΔW.

    Exact but for the rounding to dtype: files are summed by stacking their ranks. drop leaves out,
    and logs, what the format has no place for. Raises ConfigError for files that cannot be taken
    and a target that is there already, FluxfastError where the disk refuses or verify finds more
    than rounding; nothing is written then.
    """
    known_format(format)
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
    state = to_state(even, format, drop=drop)
    if over := next((key for key, tensor in state.items() if not all_finite(tensor)), None):
        raise ConfigError(f"{over} would be larger than fp32 can hold", hint="a smaller --scale")
    metadata = loras[0].metadata if len(loras) == 1 else {}
    metadata = {k: v for k, v in metadata.items() if k not in ("format", "lora_adapter_metadata")}
    content = to_bytes(state, dtype, metadata)
    lines = _compare(total, load(content), target, dtype, drop) if verify else []
    write_atomic(target, content, hint="free some space, or choose another folder")
    return lines


def read_all(
    sources: Sequence[Path | str], strengths: Sequence[float] = (), *, drop: bool = False
) -> list[LoraWeights]:
    """Each file times its strength; no strengths: 1, one strength: that for all."""
    if len(strengths) not in (0, 1, len(sources)):
        raise ConfigError(f"{len(strengths)} strengths for {len(sources)} LoRAs: give one for each")
    strengths = list(strengths or [1.0]) * (1 if len(strengths) > 1 else len(sources))
    pairs = zip(sources, strengths, strict=True)
    return [scaled(read_lora(path, drop=drop), strength) for path, strength in pairs]


def _compare(
    total: LoraWeights, content: dict[str, Tensor], target: Path, dtype: str, drop: bool
) -> list[str]:
    """A line per layer. What was dropped, and named by to_state, is not compared."""
    written = from_tensors(content, {}, target)
    lines, worst = [], (0.0, "")
    for table in ("pieces", "text"):
        here, before = getattr(written, table), getattr(total, table)
        for module in here if drop else {**before, **here}:
            parts = {part for piece in here[module] for part in piece.parts} if drop else None
            change, size = difference(total, written, table, module, parts)
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
