"""Fingerprints: identify the weights that encoded a cache file, without loading them."""

import hashlib
from pathlib import Path

from fluxfast.errors import FluxfastError

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
SETTINGS = (".json", ".txt", ".model")

MIB = 1024 * 1024
FULL_BYTES = 64 * MIB  # weight files up to here are hashed in full
CHUNKS = 16
HEADER_BYTES = 128 * MIB  # bound on a safetensors header; T5-XXL's takes 0.03 MiB


def fingerprint(folder: Path) -> str:
    """Returns a hash of a component's folder (vae/, text_encoder/, tokenizer/, …) or of one file,
    64 hex digits.

    Configurations, tokenizer files and weight files up to 64 MiB are hashed in full; of larger ones
    the size, the safetensors header and 16 evenly spaced chunks of 1 MiB: T5-XXL takes milliseconds
    instead of seconds, and a change between the chunks is not noticed. Other files (README, .cache)
    are ignored.
    Raises FluxfastError if the folder holds no such file, or cannot be read.
    """
    files, digest = {}, hashlib.sha256()
    try:
        for path in [folder] if folder.is_file() else folder.rglob("*"):
            name = path.relative_to(folder)
            hidden = any(part.startswith(".") for part in name.parts)
            known = path.suffix.lower() in WEIGHTS + SETTINGS or path == folder
            if known and not hidden and not path.is_dir():
                files[name.as_posix()] = path
        for name, path in sorted(files.items()):
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            _hash_file(path, digest)
    except OSError as error:
        raise FluxfastError(
            f"cannot read {error.filename or folder}: {error.strerror or error}"
        ) from None
    if not files:
        raise FluxfastError(f"the model component {folder} holds neither weights nor settings")
    return digest.hexdigest()


def _hash_file(path: Path, digest) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if path.suffix.lower() in SETTINGS or size <= FULL_BYTES:
            while block := file.read(MIB):
                digest.update(block)
            return
        header = 8 + int.from_bytes(file.read(8), "little")
        if path.suffix.lower() == ".safetensors" and header <= min(size, HEADER_BYTES):
            file.seek(0)
            digest.update(file.read(header))
        for chunk in range(CHUNKS):
            file.seek(chunk * (size - MIB) // (CHUNKS - 1))
            digest.update(file.read(MIB))
