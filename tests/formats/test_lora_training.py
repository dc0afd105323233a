"""Training with LoRA files: an assistant that acts in training only, a start from a file, several
formats at once; sampling with several LoRAs.
"""

from functools import partial

import numpy as np
import pytest
import torch
from lora_files import meaning, same, trained, update
from PIL import Image
from safetensors.torch import load_file
from small import SMALL, inputs, random_flux, randomize
from small_runs import losses, metrics, planned, start

from bench.saved import kept_bytes
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base.load import load_transformer
from fluxfast.formats.lora.apply import extract_lora, load_assistant, load_lora, save_lora
from fluxfast.formats.lora.read import read_lora
from fluxfast.model.lora import inject_lora, lora_layers, set_assisted, set_lora_strength
from fluxfast.tools.plan import assistant_bytes
from fluxfast.train import train


def loss_and_gradients(model, parameters, x):
    loss = model(*x).square().mean()
    return loss.item(), torch.autograd.grad(loss, parameters)


@pytest.mark.grid(3)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    "own",
    [{"targets": "attn+mlp"}, {"share_a": True}, {"include": ["to_k", "proj_mlp", "ff.net"]}],
    ids=["split", "shared", "some"],
)
@pytest.mark.parametrize("kind", ["split", "shared"])
def test_an_assistant_equals_merging_into_the_base(own, kind, dropout, tmp_path):
    """Loss and every gradient equal those of a base with the assistant's ΔW in its weights."""
    helper = trained("all", kind == "shared", rank=2, alpha=0.5, seed=7)
    file = save_lora(helper, tmp_path / "assistant.safetensors", "kohya")
    ours, merged, x = random_flux(SMALL), random_flux(SMALL), inputs(SMALL)
    for name, delta in update(helper).items():
        merged.get_submodule(name).weight.add_(delta)
    results = []
    for model in (ours, merged):
        parameters = inject_lora(model, 3, 5.0, dropout=dropout, seed=2, **own)
        randomize(model)
        model.train()
        model.dropout_clock.indices = torch.tensor([4, 9])
        if model is ours:
            alone = loss_and_gradients(model, parameters, x)
            load_assistant(model, file)
        results.append(loss_and_gradients(model, parameters, x))
    (loss, gradients), (expected, truths) = results
    assert abs(loss - expected) < 1e-5 * expected < 1e-2 * abs(loss - alone[0])
    for gradient, truth in zip(gradients, truths, strict=True):
        assert (gradient - truth).abs().max() < 2e-4 * truth.abs().max()

    set_lora_strength(ours, 0.0), set_lora_strength(merged, 0.0)
    with torch.no_grad():
        assert torch.allclose(ours(*x), merged(*x), rtol=1e-4, atol=1e-4)
    set_lora_strength(ours, 1.0)
    set_assisted(ours, False)
    off = loss_and_gradients(ours, lora_parameters(ours), x)
    assert off[0] == alone[0]
    assert all(torch.equal(a, b) for a, b in zip(off[1], alone[1], strict=True))
    assert extract_lora(ours).rank() == 3  # what would be saved knows nothing of it


def lora_parameters(model):
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def test_the_planner_counts_an_assistant(tmp_path):
    """The memory of its factors, and what a pass saves because of it."""
    file = save_lora(trained(targets="all", rank=3), tmp_path / "assistant.safetensors")
    saved, x = [], inputs(SMALL)
    for helps in (False, True):
        model = random_flux(SMALL)
        inject_lora(model, rank=2, alpha=2.0, targets="attn+mlp")
        if helps:
            load_assistant(model, file)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        known = [*model.parameters(), *model.buffers(), *x]
        saved.append(kept_bytes(known, lambda m=model: m(*x).sum()))
    own = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    counted = assistant_bytes(file, SMALL)
    assert counted == sum(4 * t.numel() for t in frozen)
    assert 0 < saved[1] - saved[0] <= counted + own


def test_an_assistant_that_is_not_there_is_refused(configure):
    with pytest.raises(FluxfastError, match="does not exist"):
        train(configure(model__assistant_lora="none.safetensors", name="b"))


@pytest.mark.parametrize(
    "changes, message, hint",
    [
        ({"model__assistant_lora": "no.safetensors"}, "cannot read", ""),
        ({"lora__init_from": "no.safetensors"}, "cannot read", ""),
        ({"model__assistant_lora": "small.safetensors"}, "do not fit this model", ""),
        ({"lora__init_from": "small.safetensors"}, "do not fit this model", ""),
        ({"lora__init_from": "old.safetensors"}, "has rank 3, lora.rank is 2", "lora.rank=3"),
        (
            {"lora__init_from": "old.safetensors", "lora__rank": 3, "lora__targets": "attn"},
            "not among the targets",
            "lora.targets: all",
        ),
        ({"lora__include": ["to_x"]}, "matches no module", ""),
        ({"save__formats": ["diffusers", "xlabs"]}, "xlabs files cannot hold", "targets: attn"),
    ],
)
def test_a_lora_that_cannot_be_is_reported_before_training(
    changes, message, hint, nano_model, tmp_path, configure, monkeypatch
):
    """Before pictures are encoded, and before an earlier run is moved aside. The hint is a setting,
    not an option of another command.
    """
    import fluxfast.train as module

    monkeypatch.chdir(tmp_path)
    (tmp_path / "no.safetensors").write_bytes(b"no LoRA")
    save_lora(trained("attn"), tmp_path / "small.safetensors")
    nano_lora(nano_model, tmp_path / "old.safetensors", rank=3, targets="attn+mlp")
    config = configure(**changes)
    monkeypatch.setattr(module, "prepare", lambda *arguments: pytest.fail("prepared"))
    (config.run_dir / "checkpoints").mkdir(parents=True)
    for restart in (False, True):
        with pytest.raises(ConfigError, match=message) as error:
            train(config, restart=restart)
        assert hint in (error.value.hint or "") and "--drop" not in (error.value.hint or "")
    assert [folder.name for folder in config.run_dir.parent.iterdir()] == [config.name]


def test_an_unreadable_lora_is_reported_before_sampling(nano_model, tmp_path, monkeypatch):
    import fluxfast.tools.generate as module
    from fluxfast.config.schema import DrawConfig, ModelConfig

    options = DrawConfig(loras=[{"file": str(tmp_path / "none.safetensors")}])
    picture = module.Picture("a cat", 1, 64, 64, 1, 1.0, options)
    monkeypatch.setattr(module, "encode_prompts", lambda *arguments: pytest.fail("encoded"))
    with pytest.raises(FluxfastError, match="none.safetensors does not exist"):
        module.generate(ModelConfig(path=str(nano_model)), [picture], tmp_path)


def nano_lora(nano_model, path, format="diffusers", rank=2, **more):
    model = load_transformer(nano_model, "fp32", "fp32", "cpu")
    inject_lora(model, rank, seed=5, **more)
    randomize(model)
    return save_lora(model, path, format)


@pytest.mark.slow
def test_a_run_with_an_assistant(nano_model, tmp_path, configure):
    """It changes what is learned, not what is saved or sampled: the preview before the first step
    is the base model's.
    """
    file = nano_lora(nano_model, tmp_path / "assistant.safetensors", "kohya", targets="all")
    sample = {"prompts": ["a thing"], "every": 0, "width": 64, "height": 64, "steps": 2}
    plain = configure(name="plain", sample=sample)
    helped = configure(name="helped", sample=sample, model__assistant_lora=str(file))
    train(plain), train(helped)
    assert metrics(plain)[0]["loss"] != metrics(helped)[0]["loss"]
    a, b = (load_file(c.run_dir / f"{c.name}.safetensors") for c in (plain, helped))
    assert {k: t.shape for k, t in a.items()} == {k: t.shape for k, t in b.items()}
    pictures = [sorted((c.run_dir / "samples").glob("*-step00000000.png")) for c in (plain, helped)]
    assert pictures[0]
    for ours, theirs in zip(*pictures, strict=True):
        assert Image.open(ours).tobytes() == Image.open(theirs).tobytes()
    for name, other in (("helped", {}), ("plain", {"model__assistant_lora": str(file)})):
        with pytest.raises(ConfigError, match="model.assistant_lora was"):
            train(configure(name=name, sample=sample, **other))


def test_a_run_starts_from_a_file(nano_model, tmp_path, configure):
    file = nano_lora(nano_model, tmp_path / "old.safetensors", "kohya")
    run, _ = start(configure(lora__init_from=str(file)))
    same_meaning(extract_lora(run.model), read_lora(file), run.model.spec)
    with pytest.raises(ConfigError, match="has rank 2, lora.rank is 4"):
        start(configure(lora__init_from=str(file), lora__rank=4, name="b"))


def test_a_resumed_run_does_not_start_again(nano_model, tmp_path, configure):
    """It continues from its checkpoint; the file may even be gone."""
    file = nano_lora(nano_model, tmp_path / "old.safetensors")
    config = configure(lora__init_from=str(file), train__steps=2)
    first = load_file(train(config))
    file.unlink()
    again = load_file(train(config))
    assert all(torch.equal(first[key], again[key]) for key in first)


def same_meaning(one, other, spec):
    same(meaning(one, spec), meaning(other, spec))


def test_several_formats(configure):
    config = configure(
        save__formats=["diffusers", "kohya", "comfyui", "bfl", "kohya"],
        train__ema={"enabled": True},
        train__steps=2,
    )
    path = train(config)
    names = {file.stem for file in config.run_dir.glob("*.safetensors")}
    suffixes = ("", "_kohya", "_comfyui", "_bfl")
    assert names == {f"small{ema}{suffix}" for ema in ("", "_ema") for suffix in suffixes}
    spec = load_transformer(config.model.path, "fp32", "fp32", "cpu").spec
    for form in ("kohya", "comfyui", "bfl"):
        other = read_lora(path.with_stem(f"{path.stem}_{form}"))
        assert other.form == form
        same_meaning(other, read_lora(path), spec)


def test_a_format_that_can_hold_the_targets_alone(configure):
    train(configure(save__formats=["xlabs"], lora__targets="attn"))


@pytest.mark.slow
def test_sampling_with_two(nano_model, tmp_path, fluxfast):
    """`--lora A --lora B --lora-strength 1 --lora-strength 0.5` gives the picture of their sum."""
    a = nano_lora(nano_model, tmp_path / "a.safetensors", "kohya", share_a=True)
    b = nano_lora(nano_model, tmp_path / "b.safetensors", "comfyui", rank=3, targets="all")
    model = load_transformer(nano_model, "fp32", "fp32", "cpu")
    load_lora(model, [a, b], [1.0, 0.5])
    total = save_lora(model, tmp_path / "total.safetensors")
    size = [
        "--width",
        "64",
        "--height",
        "64",
        "--steps",
        "2",
        "--storage",
        "fp32",
        "--compute",
        "fp32",
    ]
    sample = partial(fluxfast, "sample", "--model", nano_model, "--prompt", "a cat", *size, "--out")

    def picture(folder, *loras):
        code, out, err = sample(tmp_path / folder, *loras)
        assert code == 0, err
        return np.asarray(Image.open(out.strip()), np.float32)

    two = picture("two", "--lora", a, "--lora", b, "--lora-strength", 1, "--lora-strength", 0.5)
    one, first = picture("one", "--lora", total), picture("first", "--lora", a)
    assert abs(two - one).max() <= 1 and abs(two - first).max() > 1
    code, _, err = sample(
        tmp_path / "none", "--lora", a, "--lora-strength", 1, "--lora-strength", 2
    )
    assert code == 2 and "2 strengths for 1 LoRAs" in err


@pytest.mark.grid(1)
@pytest.mark.parametrize("policy", ["offload", "recompute_mlp", "checkpoint"])
def test_no_activation_policy_changes_an_assisted_step(policy, nano_model, tmp_path, configure):
    file = nano_lora(nano_model, tmp_path / "assistant.safetensors", targets="all")
    config = configure(model__assistant_lora=str(file))
    plain = losses(*start(config))
    assert losses(*start(config, planned(config, policy=policy))) == plain
    assert losses(*start(configure())) != plain
