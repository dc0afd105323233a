"""The loop that pretrains the nano model: what was cut short goes on to the same weights."""

from pathlib import Path

import pytest
import torch
from small import script
from torch import nn

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "nano" / "training.py"


@pytest.fixture(scope="module")
def training():
    return script(SCRIPT)


class Tied(nn.Module):
    """Two names for one weight, as T5's embeddings have, and a running mean in single precision."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = self.other = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)


def weights(training, work: Path, cut_at: int | None = None) -> list[torch.Tensor]:
    model = Tied()

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        if step == cut_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=generator)
        return (model.norm(model.one(x)) - x).square().mean()

    plan = training.Plan(steps=6, lr=0.01, warmup=2, ema=0.9)
    training.train("part", work, model, plan, loss_of)
    return list(model.state_dict().values())


def test_a_training_that_was_cut_short_goes_on_the_same(training, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0.0)  # after every step
    folders = tmp_path / "whole", tmp_path / "cut"
    for folder in folders:
        folder.mkdir()
    whole = weights(training, folders[0])
    with pytest.raises(KeyboardInterrupt):
        weights(training, folders[1], cut_at=3)
    assert [file.name for file in folders[1].iterdir()] == ["part.safetensors"]
    assert all(map(torch.equal, weights(training, folders[1]), whole))
    # once it has ended nothing is computed
    assert all(map(torch.equal, weights(training, folders[1], cut_at=0), whole))
