"""The nano model's text encoders.

T5 is drawn at random and stays so: one layer, whose states are mostly the words' own embeddings,
tells the transformer's attention all it needs. CLIP's single pooled vector would be a poor mixture
at random, so it is trained until linear heads read shape, color, place and background off it.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from draw import BACKGROUNDS, COLOURS, PLACES, SHAPES, all_captions, random_caption, random_scene
from torch import Tensor, nn
from training import Plan, train

BATCH = 48
TEXT_LENGTH = 16  # T5 tokens; the longest caption takes 12
T5_LAYERS = CLIP_LAYERS = 1
PLAN = Plan(steps=400, lr=2e-3, warmup=20, decay=0.6)
ANSWERS = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "place": tuple(PLACES),
    "background": (*BACKGROUNDS, ""),  # "": the caption leaves it open
}


class Reader(nn.Module):
    """CLIP and one linear head per question on its pooled output."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip
        width = clip.config.hidden_size
        self.heads = nn.ModuleDict({q: nn.Linear(width, len(a)) for q, a in ANSWERS.items()})

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        pooled = self.clip(ids).pooler_output
        return {question: head(pooled) for question, head in self.heads.items()}


def make_tokenizers(folder: Path):
    """-> (CLIP's, T5's) tokenizers, which know the captions' words. T5's goes to `folder`."""
    from make_nano import CORPUS, make_clip_tokenizer, make_t5_tokenizer

    corpus = CORPUS + "\n".join(all_captions()[::3]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    return make_clip_tokenizer(corpus), make_t5_tokenizer(
        folder / "spiece.model", corpus, TEXT_LENGTH
    )


def make_t5(tokenizer, seed: int):
    from make_nano import make_t5_encoder

    torch.manual_seed(seed)
    return make_t5_encoder(tokenizer, T5_LAYERS).eval()


def train_clip(work: Path, tokenizer, plan: Plan = PLAN):
    """-> CLIPTextModel whose pooled output tells captions apart, in `work/clip.safetensors`."""
    from make_nano import make_clip_encoder

    torch.manual_seed(plan.seed)
    reader = Reader(make_clip_encoder(tokenizer, CLIP_LAYERS))
    seen = {}

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rows = range(step * BATCH, (step + 1) * BATCH)
        scenes = [random_scene(plan.seed, row) for row in rows]
        captions = [
            random_caption(scene, plan.seed, row) for scene, row in zip(scenes, rows, strict=True)
        ]
        # shorter than CLIP's 77: what follows the end has no say in a causal model
        ids = tokenizer(captions, padding=True, return_tensors="pt").input_ids
        loss = torch.zeros(())
        for question, logits in reader(ids).items():
            answers = [getattr(scene, question) for scene in scenes]
            if question == "background":
                answers = [a if a in c else "" for a, c in zip(answers, captions, strict=True)]
            right = torch.tensor([ANSWERS[question].index(answer) for answer in answers])
            loss = loss + F.cross_entropy(logits, right)
            seen[question] = (logits.argmax(1) == right).float().mean().item()
        return loss

    def note() -> str:
        return "  ".join(f"{question} {share:.2f}" for question, share in seen.items())

    return train("clip", work, reader, plan, loss_of, note).clip


@torch.no_grad()
def encode(captions: list[str], tokenizers, clip, t5, length: int) -> tuple[Tensor, Tensor]:
    """As FluxPipeline does it -> (T5 states [B, length, D], pooled [B, P])."""
    pooled, states = [], []
    for start in range(0, len(captions), 64):
        part = captions[start : start + 64]
        padding = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = tokenizers[0](part, **padding).input_ids
        pooled.append(clip(ids).pooler_output)
        ids = tokenizers[1](part, max_length=length, **padding).input_ids
        states.append(t5(ids)[0])
    return torch.cat(states), torch.cat(pooled)
