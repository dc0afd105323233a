"""The photographs as `make photos` trains them, in fewer steps, and diffusers' reading of it."""

import json

import pytest
import torch
from small import logged

from fluxfast import load_transformer
from fluxfast.config.schema import load_config
from fluxfast.formats.lora.apply import load_lora
from fluxfast.train import train


@pytest.fixture(scope="module")
def run(nano_model, tmp_path_factory):
    """The shipped configuration, six steps. -> (LoRA file, what it logged, run folder)."""
    out = tmp_path_factory.mktemp("runs")
    config = load_config(
        "examples/nano/train.yaml",
        [f"model.path={nano_model}", f"output_dir={out}", "train.steps=6", "log_every=2"],
    )
    with logged() as lines:
        return train(config), lines, config.run_dir


@pytest.mark.slow
def test_photographs_train_in_several_buckets(run):
    path, lines, folder = run
    (line,) = [line for line in lines if "buckets" in line]
    assert line.startswith("22 samples") and int(line.split()[3]) >= 5
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(row["loss"] > 0 and row["skipped_steps"] == 0 for row in rows)
    assert path.stat().st_size > 100_000


def test_lora_changes_diffusers_as_it_changes_ours(run, nano_model):
    """The trained file in FluxPipeline: the output, and what the LoRA does to it, fp32."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(nano_model)
    ours = load_transformer(nano_model, "fp32", "fp32", "cpu")
    g = torch.Generator().manual_seed(0)
    spec = ours.spec
    x = dict(
        img=torch.randn(2, 24, spec.in_channels, generator=g),
        img_ids=torch.arange(72.0).view(1, 24, 3) % 5,
        txt=torch.randn(2, spec.text_length, spec.context_in_dim, generator=g),
        txt_ids=torch.zeros(1, spec.text_length, 3),
        timesteps=torch.tensor([0.2, 0.9]),
        y=torch.randn(2, spec.vec_in_dim, generator=g),
        guidance=torch.tensor([1.0, 3.5]),
    )

    def theirs() -> torch.Tensor:
        return pipeline.transformer(
            hidden_states=x["img"],
            encoder_hidden_states=x["txt"],
            pooled_projections=x["y"],
            timestep=x["timesteps"],
            img_ids=x["img_ids"][0],
            txt_ids=x["txt_ids"][0],
            guidance=x["guidance"],
        ).sample

    with torch.no_grad():
        ours_before, theirs_before = ours(**x), theirs()
        load_lora(ours, run[0])
        pipeline.load_lora_weights(run[0])
        ours_after, theirs_after = ours(**x), theirs()
    scale = theirs_after.abs().max()
    assert (ours_after - theirs_after).abs().max() < 1e-5 * scale
    change, their_change = ours_after - ours_before, theirs_after - theirs_before
    assert change.abs().max() > 1e-3 * scale
    assert (change - their_change).abs().max() < 1e-5 * scale
