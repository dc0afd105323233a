"""A small classifier that says what a 64-pixel picture shows: shape, color and place.

It judges what the nano model samples, and knows the concept too (`zorb`, as shape and as color),
so that a LoRA that teaches it can be judged. Trained on drawings and on their VAE's copies.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from draw import COLOURS, CONCEPT, PLACES, SHAPES, Scene, draw, random_scene
from torch import Tensor, nn
from training import Plan, train

FILE = "judge.safetensors"
WIDTH = 16
ANSWERS = {
    "shape": (*SHAPES, CONCEPT),
    "colour": (*COLOURS, CONCEPT),
    "place": tuple(PLACES),
}
PICTURES = 4000
BATCH = 64
PLAN = Plan(steps=600, lr=3e-3, warmup=20, decay=0.7, weight_decay=0.01, seed=5)


class Judge(nn.Module):
    """Four convolutions that halve the picture, then one linear head per question."""

    def __init__(self):
        super().__init__()
        widths = (3, WIDTH, 2 * WIDTH, 2 * WIDTH, 2 * WIDTH)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1)
            for before, after in zip(widths, widths[1:], strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in widths[1:])
        self.heads = nn.ModuleDict(
            {question: nn.Linear(16 * widths[-1], len(a)) for question, a in ANSWERS.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images [B, 3, 64, 64] in -1..1 -> logits [B, answers] per question."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.silu(norm(convolution(x)))
        return {question: head(x.flatten(1)) for question, head in self.heads.items()}

    @torch.no_grad()
    def answers(self, images: Tensor) -> list[dict[str, str]]:
        """What each picture shows: its shape, color and place."""
        chosen = {question: row.argmax(1).tolist() for question, row in self(images).items()}
        return [
            {question: ANSWERS[question][rows[i]] for question, rows in chosen.items()}
            for i in range(len(images))
        ]

    def shares_right(self, images: Tensor, scenes: list[Scene]) -> dict[str, float]:
        """Per question, the share of pictures that show what their scene says."""
        answers = self.answers(images)
        return {
            question: sum(
                a[question] == getattr(s, question) for a, s in zip(answers, scenes, strict=True)
            )
            / len(scenes)
            for question in ANSWERS
        }


def load_judge(folder: Path) -> Judge:
    """The judge that lies beside a built model."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict(load_file(Path(folder) / FILE))
    return judge.eval()


def judge_scene(seed: int, index: int) -> Scene:
    """As `random_scene`, but one in six shows the concept."""
    rng = random.Random(f"{seed}/judge/{index}")
    scene = random_scene(seed, index)
    if rng.randrange(6):
        return scene
    return Scene(CONCEPT, CONCEPT, scene.place, scene.background, scene.shift, scene.grow)


def judged_pictures(vae, seed: int, count: int) -> tuple[Tensor, list[Scene]]:
    """Pictures in -1..1, drawn ones first and then their copies by the VAE, and their scenes."""
    from vae_stage import to_tensor

    scenes = [judge_scene(seed, index) for index in range(count)]
    images = to_tensor([draw(scene) for scene in scenes]).float() / 127.5 - 1
    with torch.no_grad():
        copies = [vae(part).sample.clamp(-1, 1) for part in images.split(64)]
    return torch.cat([images, *copies]), scenes + scenes


def train_judge(work: Path, vae, plan: Plan = PLAN) -> Judge:
    """-> Judge, kept in `work`; its shares of right answers on other drawings are printed."""
    torch.manual_seed(plan.seed)
    judge = Judge()
    images, scenes = judged_pictures(vae, plan.seed, PICTURES)
    right = {
        question: torch.tensor([answers.index(getattr(scene, question)) for scene in scenes])
        for question, answers in ANSWERS.items()
    }

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        noise = torch.randn((BATCH, *images.shape[1:]), generator=generator)
        logits = judge(images[rows] + 0.1 * noise)
        return sum(F.cross_entropy(logits[question], right[question][rows]) for question in ANSWERS)

    judge = train("judge", work, judge, plan, loss_of)
    shares = judge.shares_right(*judged_pictures(vae, plan.seed + 1, 500))
    print("judge, on 1000 other pictures:", shares, flush=True)
    return judge
