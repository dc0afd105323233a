"""Optimizers from their own libraries, the schedule, clipping, the guard and the average."""

import math

import pytest
import torch

from fluxfast.config.schema import TrainConfig
from fluxfast.errors import ConfigError
from fluxfast.optim import (
    Ema,
    build_optimizer,
    clip_and_guard,
    eval_weights,
    flat_gradients,
    learning_rate,
    set_mode,
    skips_exactly,
    step_unless,
)
from fluxfast.run.checkpoint import flatten_state, read_state, save_checkpoint

OPTIMIZERS = ["adamw", "adamw8bit", "prodigy", "schedulefree", "adafactor"]


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    # the first is large enough for bitsandbytes to keep its state in 8 bits
    return [torch.nn.Parameter(torch.randn(n, generator=g)) for n in (8192, 70)]


def descend(
    train: TrainConfig,
    steps: int,
    start: int = 0,
    state=None,
    values=None,
    poisoned=None,
    ema=None,
    at_end=True,
    take=step_unless,
):
    """Minimize the square of every parameter. -> (parameters, optimizer).

    poisoned: a step at which one gradient is infinite. at_end: leave schedule-free at the point to
    save, not at the one to train at.
    """
    params = parameters()
    if values:
        for p, v in zip(params, values, strict=True):
            p.data.copy_(v)
    optimizer = build_optimizer(train, params)
    if state:
        optimizer.load_state_dict(state)
    gradients = flat_gradients(params)
    set_mode(optimizer, training=True)
    for step in range(start, start + steps):
        gradients.zero_()
        sum(p.square().sum() for p in params).backward()
        if step == poisoned:
            gradients[7] = math.inf
        _, bad = clip_and_guard(gradients, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, train)
        take(optimizer, bad)
        if ema:
            ema.update(params, bad)
    if at_end:
        set_mode(optimizer, training=False)
    return params, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_descends(name):
    before = sum(p.square().sum() for p in parameters())
    params, _ = descend(TrainConfig(optimizer=name, lr=1.0 if name == "prodigy" else 0.01), 60)
    assert sum(p.square().sum() for p in params) < 0.95 * before


@pytest.mark.parametrize(
    "name, args",
    [
        *((name, {}) for name in OPTIMIZERS),
        ("adamw", {"amsgrad": True, "betas": [0.8, 0.9]}),
        ("adamw", {"foreach": True}),
        ("adamw8bit", {"min_8bit_size": 16}),
        ("prodigy", {"use_bias_correction": True, "slice_p": 11, "d_coef": 2.0}),
        ("schedulefree", {"r": 1.0, "warmup_steps": 7}),
        ("adafactor", {"beta1": 0.9, "scale_parameter": True}),
    ],
)
def test_state_goes_through_a_checkpoint_and_on(name, args, tmp_path):
    """Ten steps in one go equal five, a save, a load, and five, bit for bit, the state too."""
    train = TrainConfig(optimizer=name, lr=1.0 if name == "prodigy" else 0.01, optimizer_args=args)
    whole, straight = descend(train, 10, at_end=False)
    half, optimizer = descend(train, 5, at_end=False)
    state = {"step": 5, "p": [p.detach() for p in half], "o": optimizer.state_dict()}
    saved = read_state(save_checkpoint(tmp_path, state, lambda folder: None, 1))
    resumed, again = descend(train, 5, 5, saved["o"], saved["p"], at_end=False)
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)
    rests, tensors = zip(*(flatten_state(o.state_dict()) for o in (straight, again)), strict=True)
    assert rests[0] == rests[1] and tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(t, tensors[1][key]) for key, t in tensors[0].items())


def test_schedule_free_is_put_back_to_the_last_bit():
    """Both ways in fp32 would round."""
    train = TrainConfig(optimizer="schedulefree", lr=0.01)
    params, optimizer = descend(train, 5, at_end=False)
    before = [p.detach().clone() for p in params]
    with eval_weights(optimizer, params):
        assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        assert not optimizer.param_groups[0]["train_mode"]
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert optimizer.param_groups[0]["train_mode"]
    set_mode(optimizer, training=False)
    set_mode(optimizer, training=True)
    assert not all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    adamw, other = descend(TrainConfig(optimizer="adamw", lr=0.01), 2)
    before = [p.detach().clone() for p in adamw]
    with eval_weights(other, adamw):
        assert all(torch.equal(p, b) for p, b in zip(adamw, before, strict=True))


def everything(params, optimizer, ema) -> list[torch.Tensor]:
    """Parameters, the optimizer's state (moments and step counts) and the average."""
    state = optimizer.state_dict()["state"]
    kept = [state[i][key] for i in sorted(state) for key in sorted(state[i])]
    return [*(p.detach() for p in params), *kept, *ema.shadow, ema.updates]


@pytest.mark.parametrize("poisoned", [0, 4, 8])
def test_a_bad_step_leaves_no_trace(poisoned):
    """Nine steps, one of them with an infinite gradient, are eight: the first, the last, or one in
    the middle, when the moments would move the parameters."""
    train = TrainConfig(optimizer="adamw", lr=0.01, optimizer_args={"weight_decay": 0.1})
    runs = []
    for steps, at in ((9, poisoned), (8, None), (9, None)):
        ema = Ema(parameters(), 0.9)
        params, optimizer = descend(train, steps, poisoned=at, ema=ema)
        runs.append(everything(params, optimizer, ema))
    for bad, without, whole in zip(*runs, strict=True):
        assert torch.equal(bad, without) and not torch.equal(bad, whole)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("poisoned", [0, 4, 8])
def test_a_bad_step_of_any_optimizer_leaves_no_trace_on_a_cpu(name, poisoned):
    train = TrainConfig(optimizer=name, lr=1.0 if name == "prodigy" else 0.01)
    bad, without, whole = (
        descend(train, steps, poisoned=at)[0] for steps, at in ((9, poisoned), (8, None), (9, None))
    )
    for one, other, more in zip(bad, without, whole, strict=True):
        assert torch.equal(one, other) and not torch.equal(one, more)


def on_a_gpu(optimizer, bad):
    """What `step_unless` comes to there without a mask."""
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_step_leaves_finite_numbers(name):
    train = TrainConfig(optimizer=name, lr=1.0 if name == "prodigy" else 0.01)
    params, _ = descend(train, 8, poisoned=4, take=on_a_gpu)
    assert all(torch.isfinite(p).all() for p in params)
    moved = [(p - q).abs().max() for p, q in zip(params, parameters(), strict=True)]
    assert min(moved) > 0


def test_adamw_that_is_not_fused_steps_on_zeros():
    """Asked for, or from a checkpoint of a run that was not fused: no mask, and no error."""
    plain = TrainConfig(optimizer="adamw", lr=0.01, optimizer_args={"foreach": True})
    params, optimizer = descend(plain, 6, poisoned=3, take=on_a_gpu)
    assert all(torch.isfinite(p).all() for p in params)
    assert all(state["step"] == 6 for state in optimizer.state.values())
    fused = TrainConfig(optimizer="adamw", lr=0.01)
    restored, _ = descend(fused, 3, 6, optimizer.state_dict(), [p.detach() for p in params], 7)
    assert all(torch.isfinite(p).all() for p in restored)


def test_where_a_bad_step_is_left_out_exactly():
    """Elsewhere the state after a row of bad steps is no last good one, and is not saved."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for name in OPTIMIZERS:
        optimizer = build_optimizer(TrainConfig(optimizer=name), parameters())
        assert skips_exactly(optimizer, cpu)
        assert skips_exactly(optimizer, gpu) == (name == "adamw")
    plain = TrainConfig(optimizer_args={"foreach": True})
    assert not skips_exactly(build_optimizer(plain, parameters()), gpu)


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match="optimizer_args of adamw"):
        build_optimizer(TrainConfig(optimizer_args={"nonsense": 1}), parameters())
    wrong = [
        ("adamw", {"betas": 3}),
        ("adamw", {"betas": [0.9]}),
        ("adamw", {"betas": [0.9, 0.99, 0.999]}),
        ("adamw", {"amsgrad": "no"}),
        ("adamw", {"differentiable": True}),
        ("adamw8bit", {"betas": [0.9]}),
        ("prodigy", {"betas": None}),
        ("schedulefree", {"eps": "1e-8"}),
        ("adafactor", {"eps": 1e-8}),  # it takes two
    ]
    for name, args in wrong:
        with pytest.raises(ConfigError, match=f"optimizer_args of {name}: .") as raised:
            build_optimizer(TrainConfig(optimizer=name, optimizer_args=args), parameters())
        assert "\n" not in raised.value.message
    with pytest.raises(ConfigError, match="lr_schedule"):
        build_optimizer(TrainConfig(optimizer="schedulefree", lr_schedule="cosine"), parameters())


def test_schedules():
    train = TrainConfig(lr=1.0, steps=110, warmup_steps=10, lr_schedule="cosine")
    values = [learning_rate(step, train) for step in range(111)]
    assert values[0] == pytest.approx(1 / 11) and values[9] < 1 == values[10]
    assert values[60] == pytest.approx(0.5) and values[110] == pytest.approx(0.0, abs=1e-9)
    linear = train.model_copy(update={"lr_schedule": "linear"})
    assert learning_rate(85, linear) == pytest.approx(0.25)
    constant = train.model_copy(update={"lr_schedule": "constant"})
    assert learning_rate(100, constant) == 1.0
    assert learning_rate(0, TrainConfig()) == 1e-4
    assert learning_rate(0, TrainConfig(optimizer="prodigy")) == 1.0


def test_clipping_is_torchs():
    ours, theirs = parameters(), parameters()
    flat = flat_gradients(ours)
    for params in (ours, theirs):
        sum((3 * p).square().sum() for p in params).backward()
    norm, bad = clip_and_guard(flat, 1.0)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert torch.allclose(norm, expected) and bad == 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5)
    flat.fill_(2.0)
    clip_and_guard(flat, None)
    assert (flat == 2.0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_guard_keeps_poison_out(poison, max_norm):
    params = parameters()
    flat = flat_gradients(params)
    flat.fill_(1.0)
    params[1].grad[3] = poison
    _, bad = clip_and_guard(flat, max_norm)
    assert bad == 1 and (flat == 0).all()


def test_a_loss_that_is_not_finite_is_bad_whatever_its_gradients():
    for loss, expected in ((math.inf, 1), (math.nan, 1), (3.0, 0)):
        flat = flat_gradients(parameters())
        flat.fill_(0.5)
        _, bad = clip_and_guard(flat, 1.0, torch.tensor(loss))
        assert bad == expected and bool((flat == 0).all()) == bool(expected)


def test_gradients_accumulate_into_the_buffer():
    params = parameters()
    flat = flat_gradients(params)
    for _ in range(3):
        sum(p.sum() for p in params).backward()
    assert all((p.grad == 3).all() for p in params)
    assert flat.sum() == 3 * sum(p.numel() for p in params)
    assert all(p.grad.data_ptr() % 64 == 0 for p in params)


def test_average_follows():
    params = parameters()
    ema = Ema(params, 0.9)
    start = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p in params:
            p.add_(1.0)
    expected = 0.0
    for n in range(1, 40):
        ema.update(params, torch.tensor(0.0))
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay)
    assert torch.allclose(ema.shadow[0], start[0] + expected, atol=1e-5)
    other = Ema(parameters(), 0.9)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 39 and torch.equal(other.shadow[1], ema.shadow[1])
