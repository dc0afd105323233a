"""Finds a model named by a path or a Hub id on this disk; downloads what the Hub cache lacks."""

import contextlib
import difflib
import json
import re
from pathlib import Path

from fluxfast.errors import FluxfastError
from fluxfast.util.files import expanded

TRANSFORMER = ("transformer",)
ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_FILE = re.compile(r".*\.(safetensors|sft|gguf|ckpt|pth?|bin)", re.I | re.S)
_HUB_ID = re.compile(rf"(?!{_FILE.pattern}$)[\w.-]+/[\w.-]+", re.I)  # no id ends as a file does


def fetch_model(path: str, components: tuple[str, ...]) -> Path:
    """Returns `path` if it exists here; else, of a Hub id, the snapshot folder with `components`.

    Looks in the Hub cache first and goes online only where a component is missing there.
    Raises FluxfastError with a hint: no such path, gated, not found, or offline.
    """
    if (local := expanded(path)).exists():
        return local
    if not _HUB_ID.fullmatch(path):
        raise _no_such_path(path)
    return _from_hub(path, components)


def fetch_lora(path: str) -> Path:
    """Returns `path` if it exists here; else, of a Hub id, the snapshot folder with its LoRA file.

    Raises FluxfastError as `fetch_model` does.
    """
    if (local := expanded(path)).exists():
        return local
    if not _HUB_ID.fullmatch(path):
        raise FluxfastError(
            f"the LoRA {path} does not exist", hint="give a .safetensors file or a Hub id"
        )
    return _from_hub(path, (), ("*.safetensors",))


def fetch_tokenizer(repo: str, name: str, beside: Path) -> Path:
    """Returns the snapshot folder of a repository with a tokenizer at its top level.

    name: tokenizer or tokenizer_2, the diffusers folder that `beside` lacks. Raises FluxfastError
    as `fetch_model` does.
    """
    files = ("vocab.json", "merges.txt") if name == "tokenizer" else ("spiece.model",)
    try:
        return _from_hub(repo, (), (*files, "tokenizer_config.json"))
    except FluxfastError as error:
        raise FluxfastError(
            f"single files bring no tokenizers, and there is none at {beside}: {error.message}",
            hint=f"connect once, or put a diffusers model's {name} folder there",
        ) from None


def _no_such_path(path: str) -> FluxfastError:
    near, local = [], expanded(path)
    with contextlib.suppress(OSError, ValueError):  # no such folder, a null byte
        names = [beside.name for beside in local.parent.iterdir()]
        near = difflib.get_close_matches(local.name, names, 1, 0.8)
    hint = (
        "give a diffusers folder, a FLUX.1 .safetensors, .sft or GGUF file, or a Hub id such as "
        "black-forest-labs/FLUX.1-dev"
    )
    return FluxfastError(
        f"{'the file' if _FILE.fullmatch(path) else 'model path'} {path} does not exist",
        hint=f"did you mean {local.parent / near[0]}?" if near else hint,
    )


def _from_hub(repo: str, components: tuple[str, ...], files: tuple[str, ...] = ()) -> Path:
    from huggingface_hub import errors, snapshot_download

    patterns = [*files, "model_index.json", *(f"{name}/*" for name in components)]

    def missing(snapshot: Path) -> list[str]:
        incomplete = [name for name in components if not _complete(snapshot / name)]
        return incomplete + [pattern for pattern in files if not any(snapshot.glob(pattern))]

    try:
        snapshot = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=True))
        if not missing(snapshot):
            return snapshot
    except errors.HFValidationError:  # ./model, ../model: a path after all
        raise _no_such_path(repo) from None
    except errors.LocalEntryNotFoundError:
        pass  # not in the cache: ask the Hub
    try:
        snapshot = Path(snapshot_download(repo, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise FluxfastError(
            f"{repo} is gated: its license has to be accepted first",
            hint=f"accept it on the page of {repo} on the Hub, then run `hf auth login`",
        ) from None
    except errors.RepositoryNotFoundError:
        raise FluxfastError(
            f"{repo} is neither a path here nor a repository on the Hub that you may read",
            hint="check the spelling; a private repository needs `hf auth login`",
        ) from None
    except Exception as error:  # requests, httpx and hf_xet each raise errors of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FluxfastError(
            f"{repo} is no path here, not complete in the local Hub cache, and could not be "
            f"downloaded: {reason}",
            hint="connect once, or give the path of a folder that holds the model",
        ) from None
    # offline, huggingface_hub returns a folder that an interrupted download left unfinished
    if absent := missing(snapshot):
        raise FluxfastError(
            f"{repo} has no complete {', '.join(absent)} in {snapshot}",
            hint="connect to finish the download; a repository without them cannot be used alone "
            "(model.encoders names another)",
        )
    return snapshot


def _complete(folder: Path) -> bool:
    """Returns whether a component's folder has every file that its index names."""
    if folder.name.startswith("tokenizer"):
        return folder.is_dir() and any(folder.iterdir())
    if not (folder / "config.json").is_file():
        return False
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return all((folder / shard).is_file() for shard in shards)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return False  # a damaged index
    return any(file.is_file() for file in folder.glob("*.safetensors"))
