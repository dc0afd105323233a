"""Finds and loads a model's components: the VAE, two text encoders, two tokenizers.

A root is a diffusers folder; or a single file, or a folder of single files, whose parts are
recognized by content (`single_file.py`). Single files hold no tokenizers: those lie beside them in
folders `tokenizer` and `tokenizer_2`, or come from the Hub.
"""

import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fluxfast.encoders.fingerprint import fingerprint
from fluxfast.encoders.single_file import NAMES, Part, find_part, fingerprint_part, load_part
from fluxfast.errors import FluxfastError
from fluxfast.util.hub import fetch_tokenizer

# the open repositories of FLUX.1's tokenizers
_TOKENIZERS = {
    "tokenizer": "openai/clip-vit-large-patch14",
    "tokenizer_2": "google/t5-v1_1-xxl",
}


def component(root: Path, name: str) -> Path | Part:
    """Returns the folder of the component `name`, or its part of a single file.

    Raises FluxfastError if there is none, ConfigError if there are several.
    """
    source = _find(root, name)
    if source is None:
        problem = (
            f"{root} holds no {NAMES[name]}" if root.is_file() else f"{root / name} is missing"
        )
        raise FluxfastError(
            f"the model component {problem}",
            hint="`model.encoders` takes a diffusers folder or a Hub id, an all-in-one file, or a "
            "folder with CLIP-L, T5 and VAE as .safetensors files",
        )
    if name in _TOKENIZERS and isinstance(source, Path) and not source.is_dir():
        return fetch_tokenizer(_TOKENIZERS[name], name, source)
    return source


def has_component(root: Path, name: str) -> bool:
    """Returns whether `component` finds it, without a download. Raises as that does."""
    return _find(root, name) is not None


def _find(root: Path, name: str) -> Path | Part | None:
    """Returns where a component lies, for the tokenizer of a single file where it would lie."""
    folder = root / name
    if _is_component(folder):
        return folder
    if name not in _TOKENIZERS:
        return find_part(root, name)
    is_diffusers = (root / "model_index.json").is_file() or _is_component(root / "text_encoder")
    if is_diffusers or not root.exists():
        return None
    return root.parent / name if root.is_file() else folder


def component_fingerprint(root: Path, name: str) -> str:
    """Returns a hash of a component's content, 64 hex digits. Raises FluxfastError."""
    source = component(root, name)
    return fingerprint_part(source) if isinstance(source, Part) else fingerprint(source)


def load_model(cls, root: Path, name: str, dtype: torch.dtype):
    """Returns a component as a `cls` of transformers or diffusers, frozen, on the CPU.

    Raises FluxfastError if it is missing, damaged, lacks weights or refers to any but safetensors
    of its own folder.
    """
    source = component(root, name)
    if isinstance(source, Part):
        with _quiet(cls):
            return load_part(source, dtype)
    _check_names(source)
    # without use_safetensors pickles would be loaded
    options: dict[str, Any] = {"output_loading_info": True, "use_safetensors": True}
    if name == "vae":
        options["torch_dtype"] = dtype
    else:
        # without attn_implementation config.json may name a repository of code to fetch and run
        options |= {"dtype": dtype, "attn_implementation": None}
    model, info = _from_pretrained(cls, source, **options)
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise FluxfastError(
            f"{source} lacks weights of {cls.__name__}: "
            f"{missing or 'of other shapes than its config.json says'}",
            hint="download the folder again",
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(cls, root: Path, name: str, vocabulary: str):
    """Returns a tokenizer. vocabulary: a file that makes up for tokenizer.json."""
    folder = component(root, name)
    assert isinstance(folder, Path)
    tokenizer = _from_pretrained(cls, folder)
    # transformers silently makes an empty tokenizer of a folder without vocabulary
    if not (folder / "tokenizer.json").is_file() and not (folder / vocabulary).is_file():
        raise FluxfastError(
            f"{folder} holds neither tokenizer.json nor {vocabulary}",
            hint="download the folder again",
        )
    return tokenizer


def _from_pretrained(cls, folder: Path, **options):
    """Loads a folder with its library, offline. Raises FluxfastError."""
    try:
        with _quiet(cls):
            return cls.from_pretrained(str(folder), local_files_only=True, **options)
    # OSError, SafetensorError, JSON and pickle errors, RuntimeError for shapes
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FluxfastError(
            f"cannot load {cls.__name__} from {folder}: {reason}", hint="download the folder again"
        ) from error


@contextmanager
def _quiet(cls) -> Iterator[None]:
    """Silences the notes of a class's library on unused weights, and its progress bars."""
    library = cls.__module__.partition(".")[0]
    library_log = importlib.import_module(f"{library}.utils.logging")
    level, bars = library_log.get_verbosity(), library_log.is_progress_bar_enabled()
    library_log.set_verbosity_error()
    library_log.disable_progress_bar()
    try:
        yield
    finally:
        library_log.set_verbosity(level)
        if bars:
            library_log.enable_progress_bar()


def _check_names(folder: Path) -> None:
    """Raises FluxfastError if a component's settings name weights that are not safetensors of its
    own folder: its library would open them, pickles too, whatever its options.
    """
    for file in [folder / "config.json", *folder.glob("*.safetensors.index.json")]:
        try:
            settings = json.loads(file.read_bytes()) if file.is_file() else {}
            names = [*settings.get("weight_map", {}).values()]
            names.append(settings.get("transformers_weights", ""))
            own = re.compile(r"[^/\\:]*\.safetensors")
            foreign = next((name for name in names if name and not own.fullmatch(name)), None)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise FluxfastError(
                f"cannot load {file}: {error}", hint="download the folder again"
            ) from None
        if foreign:
            raise FluxfastError(
                f"cannot load {folder}: {file.name} names {foreign!r}, which is no "
                ".safetensors file of the folder",
                hint="look for the same model with its weights in safetensors",
            )


def _is_component(folder: Path) -> bool:
    # ComfyUI has a folder `vae` too, of files without a configuration
    return folder.is_dir() and any(folder.glob("*.json"))
