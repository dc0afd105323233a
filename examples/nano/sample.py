"""Samples captioned pictures from a built nano folder and has its judge say what they show.

python examples/nano/sample.py [MODEL] [--count 100] [--seed 11] [--sheet sheet.png]
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def sample_pictures(model: Path, captions: list[str], seed: int = 11, steps: int = 20):
    """-> pictures in -1..1, [B, 3, 64, 64], by Euler's method from the folder's own weights."""
    import torch
    from flow_stage import sample
    from text_stage import TEXT_LENGTH

    from fluxfast.encoders.text import TextEncoders
    from fluxfast.encoders.vae import Vae

    states, pooled = TextEncoders(model).encode(captions, TEXT_LENGTH)
    with torch.no_grad():
        return Vae(model).decode(sample(_transformer(model), states, pooled, seed, steps))


def judge_samples(model: Path, count: int, seed: int) -> dict[str, float]:
    """The share of `count` sampled pictures that show the shape, color and place asked for."""
    from draw import random_scene
    from judge import load_judge

    scenes = [random_scene(seed, index) for index in range(count)]
    images = sample_pictures(model, [scene.caption() for scene in scenes], seed)
    return load_judge(model).shares_right(images, scenes)


def write_sheet(images, path: Path, columns: int = 10) -> None:
    """All pictures in one PNG, row by row."""
    import numpy as np
    from PIL import Image

    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pad = -len(pixels) % columns
    pixels = np.concatenate([pixels, np.zeros((pad, *pixels.shape[1:]), np.uint8)])
    rows = [np.concatenate(pixels[i : i + columns], axis=1) for i in range(0, len(pixels), columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def _transformer(model: Path):
    import torch
    from diffusers import FluxTransformer2DModel

    folder = Path(model) / "transformer"
    return FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=HERE / "model", metavar="MODEL")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--sheet", type=Path, help="a PNG of the pictures")
    args = parser.parse_args()
    sys.path.insert(0, str(HERE.parent.parent))  # fluxfast need not be installed
    from draw import random_scene
    from judge import load_judge

    scenes = [random_scene(args.seed, index) for index in range(args.count)]
    images = sample_pictures(args.model, [scene.caption() for scene in scenes], args.seed)
    if args.sheet:
        write_sheet(images, args.sheet)
    print(json.dumps(load_judge(args.model).shares_right(images, scenes)))


if __name__ == "__main__":
    main()
