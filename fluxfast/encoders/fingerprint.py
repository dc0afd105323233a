"""Fingerprints: which weights an encoded file came from, told without loading them."""

import hashlib
import os
from pathlib import Path

from fluxfast.errors import FluxfastError

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
SETTINGS = (".json", ".txt", ".model")

MIB = 1024 * 1024
FULL_BYTES = 64 * MIB  # weight files up to here are hashed in full
CHUNKS = 16
HEADER_BYTES = 128 * MIB  # bound on a safetensors header; T5-XXL's takes 0.03 MiB


def fingerprint(folder: Path) -> str:
    """Hash of a model component's folder (vae/, text_encoder/, tokenizer/, …), 64 hex digits.

    Configurations and tokenizer files count in full, weight files up to 64 MiB too. Of larger ones
    the size, the safetensors header and 16 evenly spaced chunks of 1 MiB: T5-XXL takes milliseconds
    instead of seconds. A change between the chunks goes unseen. Other files (README, .cache) do not
    count.
    Raises FluxfastError if the folder is missing, holds nothing that counts, or cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FluxfastError(
            f"the model component {folder} is missing",
            hint="`model.encoders` takes a diffusers folder with vae, text_encoder, text_encoder_2 "
            "and both tokenizers",
        )
    digest = hashlib.sha256()
    try:
        files = _files(folder)
        for path in files:
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            _hash_file(path, digest)
    except OSError as error:
        raise FluxfastError(
            f"cannot read {error.filename or folder}: {error.strerror or error}"
        ) from None
    if not files:
        raise FluxfastError(f"the model component {folder} holds neither weights nor settings")
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in WEIGHTS + SETTINGS
        ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _hash_file(path: Path, digest) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if path.suffix.lower() not in WEIGHTS or size <= FULL_BYTES:
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
