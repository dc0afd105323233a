"""What autograd keeps per token, at full width: under the limits, and as docs/memory.md says."""

from pathlib import Path

import pytest
import torch

from bench.saved import LIMITS, diffusers_counts, fluxfast_counts, kept_bytes

MEMORY = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")


def in_kilobytes(count: float) -> str:
    return f"{count / 1000:.1f}"


@pytest.fixture(scope="module")
def counts() -> dict[str, float]:
    return fluxfast_counts("attn+mlp")


def test_storages_count_once_and_weights_and_inputs_not():
    x, model = torch.randn(8, 64), torch.nn.Linear(64, 64)
    # saves relu's output, for relu and for square
    assert kept_bytes([x, *model.parameters()], lambda: torch.relu(model(x)).square()) == x.nbytes


@pytest.mark.slow
def test_blocks_keep_no_more_than_they_need(counts):
    for kind, count in counts.items():
        assert count <= LIMITS[kind, "attn+mlp"], kind


@pytest.mark.slow
def test_the_document_states_the_counts(counts):
    assert f"{in_kilobytes(counts['double'])} kB per token in a double block" in MEMORY
    assert f"{in_kilobytes(counts['single'])} kB in a single one" in MEMORY


@pytest.mark.slow
def test_diffusers_keeps_twice_as_much(counts):
    theirs = diffusers_counts()
    double, single = in_kilobytes(theirs["double"]), in_kilobytes(theirs["single"])
    assert f"diffusers + peft: {double} and {single}" in MEMORY
    assert all(theirs[kind] > 2 * counts[kind] for kind in counts)
