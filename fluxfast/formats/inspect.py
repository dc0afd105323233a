"""`fluxfast inspect`: describes a file or folder by its content. Only headers are read."""

import re
from collections import Counter
from pathlib import Path

from rich.filesize import decimal

from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base import bnb, eight_bit
from fluxfast.formats.base.detect import Naming, find_naming, is_lora, model_name
from fluxfast.formats.base.folder import folder_spec, other_in, transformer_folder, weight_files
from fluxfast.formats.base.quantize import SHA_KEY, verify
from fluxfast.formats.base.reader import (
    STORAGE_KEY,
    file_spec,
    impossible_sizes,
    not_flux,
    quantized_with,
)
from fluxfast.formats.lora.inspect import describe_lora, listed
from fluxfast.formats.lora.names import foreign_kind
from fluxfast.formats.opened import Files
from fluxfast.model.names import tensor_sources
from fluxfast.model.spec import FluxSpec

# other networks of an all-in-one file, by a piece of their keys
_NETWORKS = {
    "CLIP-L": "text_model.encoder.layers.0.",
    "T5": "block.0.layer.0.SelfAttention.",
    "VAE": "decoder.up.0.",
    "VAE (diffusers)": "decoder.up_blocks.0.",
}
# a tensor that bitsandbytes keeps beside a matrix
_BNB_SIDE = re.compile(r"(.*\.weight)\.(?:\w+_quant_map|quant_map|\w*absmax|quant_state\.\w+)")


def inspect(path: Path | str, checksum: bool = False) -> list[str]:
    """Returns lines of `title  value` about a base checkpoint, a LoRA or another safetensors or
    GGUF file.

    checksum: read a prequantized file whole and compare. Raises FluxfastError if there is no such
    path, ConfigError if it cannot be read or the checksum differs.
    """
    path = Path(path)
    folder = transformer_folder(path) if path.is_dir() else None
    if folder is None and not path.is_file():
        raise FluxfastError(f"{path} does not exist")
    with Files(weight_files(folder) if folder else [path]) as files:
        size = decimal(sum(file.path.stat().st_size for file in files.containers))
        rows = [("file", f"{path}, {size}"), *_describe(path, folder, files)]
        if SHA_KEY in files.metadata:
            if checksum and not verify(files):
                raise ConfigError(
                    f"{path} is damaged: its checksum is not that of its tensors",
                    hint="quantize it again, or download it again",
                )
            rows.append(("checksum", "right" if checksum else "there; --checksum compares it"))
    return [f"{title:9} {value}" for title, value in rows]


def _describe(path: Path, folder: Path | None, files: Files) -> list[tuple[str, str]]:
    keys = list(files.entries)
    if is_lora(keys) or any(map(foreign_kind, keys)):
        return [*describe_lora(files), ("dtypes", _dtypes(files))]
    count = len(files.containers)
    container = files.containers[0].kind + (f" in {count} files" if count > 1 else "")
    has_config = folder is not None and (folder / "config.json").is_file()
    naming = Naming("", split=True) if has_config else find_naming(keys)
    spec, other = None, None if naming else other_in(files)
    if folder and has_config:
        with impossible_sizes(path):
            spec = folder_spec(path, folder)
    foreign = quantized_with(files, naming, folder)
    if naming is None or foreign:
        if not (other or foreign):
            raise not_flux(path, None)
        model = f"{other}: not a FLUX.1 transformer"
        if other is None:
            what = "FLUX.1 transformer" if naming else "model"
            model = f"{what} quantized with {foreign}: not read here"
        return [("format", container), ("model", model), ("dtypes", _dtypes(files))]
    spec = spec or file_spec(path, files, naming)
    guidance = "with guidance" if spec.guidance_embed else "without guidance"
    sizes = (
        f"{spec.depth} double and {spec.depth_single_blocks} single blocks, hidden "
        f"{spec.hidden_size}, {spec.num_heads} heads, {guidance}"
    )
    return [
        ("format", f"{container}, {_layout(files, naming)}"),
        ("model", f"{model_name(spec)}: {sizes}"),
        ("dtypes", _dtypes(files, naming.prefix)),
        *_keys(files, naming, spec),
    ]


def _layout(files: Files, naming: Naming) -> str:
    names = "diffusers names" if naming.split else "BFL names"
    prefix = f" under {naming.prefix}" if naming.prefix else ""
    if storage := files.metadata.get(STORAGE_KEY):
        version = files.metadata.get("fluxfast.version", "")
        form = f"quantized to {storage} by fluxfast {version}".strip()
    else:  # of the blocks' matrices
        side = eight_bit.SideTensors(files, naming.prefix)
        forms = Counter(
            _form(files, key, side)
            for key, entry in files.entries.items()
            if "_blocks." in key and key.endswith(".weight") and len(entry.shape) == 2
        )
        counted = (
            f"{form} ({count})" if len(forms) > 1 else form for form, count in forms.most_common()
        )
        form = "; ".join(counted) or "no matrices"
    return f"{names}{prefix}, {form}"


def _form(files: Files, key: str, side: eight_bit.SideTensors) -> str:
    for kind in bnb.KINDS:
        if f"{key}.{bnb.STATE}{kind}" in files.entries:
            nested = f"{key}.nested_absmax" in files.entries
            return f"bitsandbytes {kind.upper()}" + (" with nested scales" if nested else "")
    return side.form(key)


def _dtypes(files: Files, prefix: str = "") -> str:
    counts = Counter(e.dtype for key, e in files.entries.items() if key.startswith(prefix))
    return ", ".join(f"{dtype} {count}" for dtype, count in counts.most_common())


def _keys(files: Files, naming: Naming, spec: FluxSpec) -> list[tuple[str, str]]:
    """Returns rows about the keys that the model lacks, and those it does not need."""
    sources, prefix = tensor_sources(spec), naming.prefix
    needed = {key for name, parts in sources.items() for key in naming.keys(name, parts)}
    extra = sorted(key for key in files.entries.keys() - needed if not _is_side(key, needed))
    own = [key for key in extra if key.startswith(prefix)]
    others = [key for key in extra if not key.startswith(prefix)]
    rows = [("missing", listed(sorted(needed - files.entries.keys()))), ("extra", listed(own))]
    if others:
        known = [name for name, piece in _NETWORKS.items() if any(piece in key for key in others)]
        rows.append(("beside", f"{', '.join(known) or 'other tensors'} ({len(others)} tensors)"))
    return rows


def _is_side(key: str, needed: set[str]) -> bool:
    """Returns whether the tensor belongs to a quantized matrix."""
    if match := _BNB_SIDE.fullmatch(key):
        return match[1] in needed
    module, _, name = key.rpartition(".")
    if name in eight_bit.SIDE:
        return f"{module}.weight" in needed
    return name == eight_bit.MARKER
