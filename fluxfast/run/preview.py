"""Previews while training: the same prompts and seeds at every step, from cached embeddings."""

import re
from pathlib import Path

import torch

from fluxfast.config.schema import Config
from fluxfast.data.store import TEXT, read_tensors
from fluxfast.model.flux import Flux
from fluxfast.sampling import Picture, contact_sheet, draw_pictures, save_picture

_FILE = re.compile(r"(\d+)-step(\d+)\.png")


def preview_due(config: Config, done: int) -> bool:
    """Whether previews are drawn after `done` steps (0: before the first)."""
    sample = config.sample
    if not sample.prompts:
        return False
    if done == 0:
        return sample.first
    return done == config.train.steps or bool(sample.every and done % sample.every == 0)


def draw_previews(
    config: Config,
    model: Flux,
    prompts: dict[str, Path],
    root: Path,
    device: torch.device,
    dtype: torch.dtype,
    step: int,
) -> list[Path]:
    """Draw every prompt, save RUN/samples/NN-stepNNNNNNNN.png, redo RUN/samples.png. -> the
    files.
    """
    sample = config.sample
    pictures, embeddings = [], []
    for index, (prompt, file) in enumerate(prompts.items()):
        seed = sample.seed + index if sample.walk_seed else sample.seed
        pictures.append(
            Picture(prompt, seed, sample.width, sample.height, sample.steps, sample.guidance)
        )
        tensors = read_tensors(file, TEXT)
        embeddings.append((tensors["t5"], tensors["pooled"]))
    images = draw_pictures(model, pictures, embeddings, root, device, dtype)
    folder = config.run_dir / "samples"
    files = []
    for index, (picture, image) in enumerate(zip(pictures, images, strict=True)):
        files.append(folder / f"{index:02d}-step{step:08d}.png")
        save_picture(files[-1], image, picture, run=config.name, step=str(step))
    _sheet(config, list(prompts), folder)
    return files


def _sheet(config: Config, prompts: list[str], folder: Path) -> None:
    """The contact sheet, from the files that are there: a resumed run keeps its earlier columns."""
    found = {}
    for file in folder.glob("*.png"):
        match = _FILE.fullmatch(file.name)
        if match:
            found[(int(match[1]), int(match[2]))] = file
    steps = sorted({step for _, step in found})
    rows = [(prompt, [found.get((i, step)) for step in steps]) for i, prompt in enumerate(prompts)]
    contact_sheet(rows, [f"step {step}" for step in steps], config.run_dir / "samples.png")
