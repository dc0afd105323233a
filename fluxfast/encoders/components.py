"""Where each component of a model lies: the VAE, two text encoders, two tokenizers.

A root is a diffusers folder; or a single file, or a folder of single files, whose parts are found
by content (`formats/parts.py`). Single files hold no tokenizers: those lie beside them in folders
`tokenizer` and `tokenizer_2`, or come from the Hub.
"""

import json
from pathlib import Path

from fluxfast.encoders.fingerprint import fingerprint
from fluxfast.errors import FluxfastError
from fluxfast.formats.parts import NAMES, Part, find_part, fingerprint_part
from fluxfast.hub import resolve_tokenizer

# repositories that FLUX.1's own tokenizers came from, open to all
_TOKENIZERS = {
    "tokenizer": "openai/clip-vit-large-patch14",
    "tokenizer_2": "google/t5-v1_1-xxl",
}


def component(root: Path, name: str) -> Path | Part:
    """The folder of the component `name`, or its part in a single file.

    Raises FluxfastError where there is none, ConfigError where there are several.
    """
    root = Path(root)
    folder = root / name
    if _is_component(folder):
        return folder
    if name in _TOKENIZERS and root.exists() and not _is_diffusers(root):
        beside = root.parent / name if root.is_file() else folder
        return beside if beside.is_dir() else resolve_tokenizer(_TOKENIZERS[name], name, beside)
    part = None if name in _TOKENIZERS else find_part(root, name)
    if part is None:
        what = f"{root} holds no {NAMES[name]}" if root.is_file() else f"{folder} is missing"
        raise FluxfastError(
            f"the model component {what}",
            hint="`model.encoders` takes a diffusers folder or a Hub id, an all-in-one file, or a "
            "folder with CLIP-L, T5 and VAE as .safetensors files",
        )
    return part


def has_component(root: Path, name: str) -> bool:
    """Whether `component` has somewhere to take it from; single files may have their tokenizers
    from the Hub.

    Raises ConfigError where several files have it.
    """
    if _is_component(root / name):
        return True
    if name in _TOKENIZERS:
        return not _is_diffusers(root)
    return find_part(root, name) is not None


def check_folder(folder: Path) -> None:
    """Raise FluxfastError where a component's settings name weights that are not safetensors of its
    own folder: its library would open them, pickles too, whatever it was told.
    """
    for file in [folder / "config.json", *folder.glob("*.safetensors.index.json")]:
        try:
            said = json.loads(file.read_bytes()) if file.is_file() else {}
            names = {*said.get("weight_map", {}).values(), said.get("transformers_weights", "")}
            odd = [name for name in names if name and not _is_own(name)]
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise FluxfastError(
                f"cannot load {file}: {error}", hint="download the folder again"
            ) from None
        if odd:
            raise FluxfastError(
                f"cannot load {folder}: {file.name} names {odd[0]!r}, which is no "
                ".safetensors file of the folder",
                hint="look for the same model with its weights in safetensors",
            )


def _is_own(name: str) -> bool:
    return name.endswith(".safetensors") and not any(sign in name for sign in "/\\:")


def component_print(root: Path, name: str) -> str:
    """Fingerprint of a component's content -> 64 hex digits. Raises FluxfastError."""
    found = component(root, name)
    return fingerprint_part(found) if isinstance(found, Part) else fingerprint(found)


def _is_component(folder: Path) -> bool:
    # ComfyUI has a folder `vae` too, of files without a configuration
    return folder.is_dir() and any(folder.glob("*.json"))


def _is_diffusers(root: Path) -> bool:
    return (root / "model_index.json").is_file() or _is_component(root / "text_encoder")
