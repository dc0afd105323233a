"""Optimizers from their own libraries, the schedule, clipping, the guard and the average."""

import math
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fluxfast.optim
from fluxfast.config.schema import TrainConfig
from fluxfast.errors import ConfigError
from fluxfast.optim import (
    Ema,
    FlatParameters,
    build_optimizer,
    check_optimizer,
    clip_and_guard,
    eval_weights,
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


def flat_of(train: TrainConfig) -> FlatParameters:
    return FlatParameters(parameters(), train)


def made(train: TrainConfig) -> torch.optim.Optimizer:
    return build_optimizer(train, flat_of(train))


def settings(name: str, **args) -> TrainConfig:
    return TrainConfig(optimizer=name, lr=1.0 if name == "prodigy" else 0.01, optimizer_args=args)


def descend(
    train: TrainConfig,
    steps: int,
    start: int = 0,
    state=None,
    values=None,
    poisoned=None,
    flat=None,
    ema=None,
    take=step_unless,
):
    """Minimize the square of every parameter. Returns (parameters, optimizer), in training mode.

    state, values: of optimizer and parameters, to start from. poisoned: a step at which one
    gradient is infinite. flat: the parameters. take: what takes the optimizer's step.
    """
    flat = flat or flat_of(train)
    params = flat.parameters
    for p, v in zip(params, values or params, strict=True):
        p.data.copy_(v)
    optimizer, gradients = build_optimizer(train, flat), flat.gradients
    if state:
        flat.load_state_dict(optimizer, state)
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
            ema.update(bad)
    return params, optimizer


def same(ours, theirs) -> bool:
    return all(map(torch.equal, ours, theirs))


def copies(params) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_descends(name):
    before = sum(p.square().sum() for p in parameters())
    params, optimizer = descend(settings(name), 60)
    with eval_weights(optimizer):
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
    """Ten steps in one go equal five, a save, a load, and five, bit for bit, the state too. The
    checkpoint that was trained on from stays as it was."""
    train = settings(name, **args)
    flats = [flat_of(train) for _ in range(3)]
    whole, straight = descend(train, 10, flat=flats[0])
    half, optimizer = descend(train, 5, flat=flats[1])
    state = {"step": 5, "p": [p.detach() for p in half], "o": flats[1].state_dict(optimizer)}
    folder = save_checkpoint(tmp_path, state, lambda folder: None, 1)
    saved, before = read_state(folder), read_state(folder)
    resumed, again = descend(train, 5, 5, saved["o"], saved["p"], flat=flats[2])
    assert same(whole, resumed)
    assert_same_state(flats[0].state_dict(straight), flats[2].state_dict(again))
    assert_same_state(before, read_state(folder))


def assert_same_state(one, other) -> None:
    rests, tensors = zip(flatten_state(one), flatten_state(other), strict=True)
    assert rests[0] == rests[1] and tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())


def test_schedule_free_is_put_back_to_the_last_bit():
    """Both ways in fp32 would round."""
    params, optimizer = descend(settings("schedulefree"), 5)
    before = copies(params)
    with eval_weights(optimizer):
        assert not any(map(torch.equal, params, before))
        assert not optimizer.param_groups[0]["train_mode"]
    assert same(params, before) and optimizer.param_groups[0]["train_mode"]
    set_mode(optimizer, training=False)
    set_mode(optimizer, training=True)
    assert not same(params, before)
    params, optimizer = descend(settings("adamw"), 2)
    before = copies(params)
    with eval_weights(optimizer):
        assert same(params, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("poisoned", [0, 4, 8])
def test_a_bad_step_of_any_optimizer_leaves_no_trace_on_a_cpu(name, poisoned):
    """Nine steps, one of them with an infinite gradient, are eight: the first, the last, or one in
    the middle, when the moments would move the parameters. The state and the average too."""
    runs = []
    for steps, at in ((9, poisoned), (8, None), (9, None)):
        train = settings(name, weight_decay=0.1)
        ema = Ema(flat := flat_of(train), 0.9)
        params, optimizer = descend(train, steps, poisoned=at, flat=flat, ema=ema)
        _, tensors = flatten_state(optimizer.state_dict())
        runs.append(([*copies(params), *ema.shadow, ema.updates], tensors))
    (bad, bad_state), (without, state), (whole, _) = runs
    assert same(bad, without) and not any(map(torch.equal, bad, whole))
    assert bad_state.keys() == state.keys()
    assert all(torch.equal(bad_state[key], tensor) for key, tensor in state.items())


def on_a_gpu(optimizer, bad):
    """What `step_unless` comes to there without a mask."""
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_step_leaves_finite_numbers(name):
    params, _ = descend(settings(name), 8, poisoned=4, take=on_a_gpu)
    assert all(torch.isfinite(p).all() for p in params)
    moved = [(p - q).abs().max() for p, q in zip(params, parameters(), strict=True)]
    assert min(moved) > 0


def test_adamw_that_is_not_fused_steps_on_zeros():
    """Configured, or from a checkpoint of a run that was not fused: no mask, and no error."""
    train = settings("adamw", foreach=True)
    flat = flat_of(train)
    params, optimizer = descend(train, 6, poisoned=3, flat=flat, take=on_a_gpu)
    assert all(torch.isfinite(p).all() for p in params)
    assert all(state["step"] == 6 for state in optimizer.state.values())
    state, values = flat.state_dict(optimizer), copies(params)
    restored, _ = descend(settings("adamw"), 3, 6, state, values, 7)
    assert all(torch.isfinite(p).all() for p in restored)


def test_where_a_bad_step_is_left_out_exactly():
    """Elsewhere the state after a row of bad steps is no last good one, and is not saved."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for name in OPTIMIZERS:
        optimizer = made(settings(name))
        assert skips_exactly(optimizer, cpu)
        assert skips_exactly(optimizer, gpu) == (name == "adamw")
    assert not skips_exactly(made(settings("adamw", foreach=True)), gpu)


@pytest.mark.parametrize(
    "name, args",
    [
        ("adamw", {"nonsense": 1}),
        ("adamw", {"betas": 3}),
        ("adamw", {"betas": [0.9]}),
        ("adamw", {"betas": [0.9, 0.99, 0.999]}),
        ("adamw", {"amsgrad": "no"}),
        ("adamw", {"differentiable": True}),
        ("adamw8bit", {"betas": [0.9]}),
        ("prodigy", {"betas": None}),
        ("schedulefree", {"eps": "1e-8"}),
        ("adafactor", {"eps": 1e-8}),  # it takes two
        ("prodigy", {"decouple": "False"}),  # a word is true
        ("adamw", {"weight_decay": -1}),
    ],
)
def test_bad_arguments_are_named(name, args):
    with pytest.raises(ConfigError, match=f"optimizer_args of {name}: .") as raised:
        made(settings(name, **args))
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    "name, args, words, hint",
    [
        (
            "adamw",
            {"weight_decya": 1},
            "'weight_decya', did you mean 'weight_decay'?",
            "betas, eps",
        ),
        ("prodigy", {"xyz": 1}, "there is no 'xyz'", "decouple"),
        ("adamw", {"lr": 1e-3}, "there is no 'lr'", "train.lr"),
        ("adamw", {"eps": "1e-8"}, "eps takes a number such as 1e-08 (got '1e-8')", ""),
        ("adamw", {"betas": "0.9"}, "betas takes 2 numbers such as [0.9, 0.999] (got '0.9')", ""),
        (
            "adamw",
            {"betas": [0.9, "x"]},
            "betas takes 2 numbers such as [0.9, 0.999] (got [0.9, 'x'])",
            "",
        ),
        ("prodigy", {"decouple": 2}, "decouple takes true or false (got 2)", ""),
        ("adamw", {"betas": [0.9, 0.99], "weight_decay": -1}, "weight_decay -1 cannot be", ""),
    ],
)
def test_an_argument_that_cannot_be_is_told_from_the_others(name, args, words, hint):
    with pytest.raises(ConfigError) as raised:
        made(settings(name, **args))
    assert words in raised.value.message and hint in (raised.value.hint or "")


def test_what_a_library_prints_is_no_result(capsys):
    made(settings("prodigy", decouple=1, weight_decay=0.1))
    made(settings("adamw", amsgrad=0))
    assert capsys.readouterr() == ("", "Using decoupled weight decay\n")


@pytest.mark.parametrize(
    "name, module, library",
    [
        ("adamw8bit", "bitsandbytes.optim", "bitsandbytes"),
        ("prodigy", "prodigyopt", "prodigyopt"),
        ("schedulefree", "schedulefree", "schedulefree"),
        ("adafactor", "transformers.optimization", "transformers"),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_command(name, module, library, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"{name} needs the library {library}") as raised:
        check_optimizer(settings(name), torch.device("cpu"))
    assert raised.value.hint.startswith(f"pip install {library};")


def test_schedule_free_takes_no_schedule():
    with pytest.raises(ConfigError, match="lr_schedule"):
        made(TrainConfig(optimizer="schedulefree", lr_schedule="cosine"))


def test_schedules():
    train = TrainConfig(lr=1.0, steps=110, warmup_steps=10, lr_schedule="cosine")
    values = [learning_rate(step, train) for step in range(111)]
    assert values[0] == pytest.approx(1 / 11) and values[9] < 1 == values[10]
    assert values[60] == pytest.approx(0.5) and values[110] == pytest.approx(0.0, abs=1e-9)
    linear = train.model_copy(update={"lr_schedule": "linear"})
    assert learning_rate(85, linear) == pytest.approx(0.25)
    floor = linear.model_copy(update={"lr_end": 0.2})
    assert [learning_rate(step, floor) for step in (10, 60, 110)] == pytest.approx([1, 0.6, 0.2])
    constant = train.model_copy(update={"lr_schedule": "constant"})
    assert learning_rate(100, constant) == 1.0
    assert learning_rate(0, TrainConfig()) == 1e-4
    assert learning_rate(0, TrainConfig(optimizer="prodigy")) == 1.0


def test_clipping_is_torchs():
    ours, theirs = parameters(), parameters()
    flat = FlatParameters(ours).gradients
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


@pytest.mark.parametrize("gradient", [math.nan, math.inf])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_is_bad_and_zeroed(gradient, max_norm):
    params = parameters()
    flat = FlatParameters(params).gradients
    flat.fill_(1.0)
    params[1].grad[3] = gradient
    _, bad = clip_and_guard(flat, max_norm)
    assert bad == 1 and (flat == 0).all()


@pytest.mark.parametrize("loss, expected", [(math.inf, 1), (math.nan, 1), (3.0, 0)])
def test_a_loss_that_is_not_finite_is_bad_whatever_its_gradients(loss, expected):
    flat = FlatParameters(parameters()).gradients
    flat.fill_(0.5)
    _, bad = clip_and_guard(flat, 1.0, torch.tensor(loss))
    assert bad == expected and bool((flat == 0).all()) == bool(expected)


def test_gradients_accumulate_into_the_buffer():
    params = parameters()
    flat = FlatParameters(params).gradients
    for _ in range(3):
        sum(p.sum() for p in params).backward()
    assert all((p.grad == 3).all() for p in params)
    assert flat.sum() == 3 * sum(p.numel() for p in params)
    assert all(p.grad.data_ptr() % 64 == 0 for p in params)


def test_average_follows():
    flat = FlatParameters(parameters())
    ema = Ema(flat, 0.9)
    start = copies(flat.parameters)
    with torch.no_grad():
        for p in flat.parameters:
            p.add_(1.0)
    expected = 0.0
    for n in range(1, 40):
        ema.update(torch.tensor(0.0))
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay)
    assert torch.allclose(ema.shadow[0], start[0] + expected, atol=1e-5)
    other = Ema(FlatParameters(parameters()), 0.9)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 39 and torch.equal(other.shadow[1], ema.shadow[1])


# ---------------------------------------------------------------- one tensor for all parameters

CASES = [
    *((name, {}) for name in OPTIMIZERS),
    ("adamw", {"amsgrad": True, "foreach": True}),
    ("adamw8bit", {"min_8bit_size": 16}),
    ("adamw8bit", {"min_8bit_size": 5000}),
    ("prodigy", {"slice_p": 11}),
]


def odd_parameters() -> list[torch.nn.Parameter]:
    """Large and small, one zero as B is, in sizes that 16 divides and 256 does not: a CPU's loops
    round what is left over of their vectors in another way."""
    g = torch.Generator().manual_seed(0)
    shapes = [(24, 14), (8192,), (80,), (4112,), (60, 100), (2096,), (2096,)]
    made = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    made[4].data.zero_()
    return made


class Steps:
    """Steps on given gradients: of an optimizer over each parameter, or over the flat tensor."""

    def __init__(self, train: TrainConfig, flat: bool):
        self.parameters = odd_parameters()
        self.flat = FlatParameters(self.parameters, train) if flat else None
        if self.flat:
            self.optimizer = build_optimizer(train, self.flat)
        else:
            self.optimizer = check_optimizer(train, torch.device("cpu"))(self.parameters)
        set_mode(self.optimizer, training=True)

    def take(self, steps: range) -> None:
        for step in steps:
            g = torch.Generator().manual_seed(step)
            for p in self.parameters:
                gradient = torch.randn(p.shape, generator=g)
                p.grad = gradient if self.flat is None else p.grad.copy_(gradient)
            self.optimizer.step()

    def state(self) -> dict:
        return self.flat.state_dict(self.optimizer) if self.flat else self.optimizer.state_dict()


@pytest.mark.parametrize("name, args", CASES)
def test_a_flat_tensor_takes_the_steps_of_each_parameter(name, args, tmp_path):
    """To the bit, from the first step, whose state was made before, and from a checkpoint of an
    optimizer over each parameter. prodigy's d is a sum over all elements, in another order."""
    train = settings(name, **{"weight_decay": 0.1, **args})
    each, flat, resumed = (Steps(train, flat=kind) for kind in (False, True, True))
    each.take(range(3))
    save_checkpoint(tmp_path, {"step": 3, "o": each.state()}, lambda folder: None, 1)
    resumed.flat.load_state_dict(
        resumed.optimizer, read_state(tmp_path / "checkpoints" / NAME)["o"]
    )
    with torch.no_grad():
        for p, value in zip(resumed.parameters, each.parameters, strict=True):
            p.copy_(value)
    each.take(range(3, 6))
    flat.take(range(6))
    resumed.take(range(3, 6))
    for steps in (flat, resumed):
        for p, expected in zip(steps.parameters, each.parameters, strict=True):
            assert torch.allclose(p, expected, rtol=1e-4, atol=1e-7)
            assert name == "prodigy" or torch.equal(p, expected)
        rests, tensors = zip(flatten_state(steps.state()), flatten_state(each.state()), strict=True)
        if name != "prodigy":
            assert rests[0] == rests[1]
        for key, tensor in tensors[1].items():
            assert torch.allclose(tensors[0][key].float(), tensor.float(), rtol=1e-4, atol=1e-7)
            assert name == "prodigy" or torch.equal(tensors[0][key], tensor), key
        for p in steps.parameters:
            p.data.zero_()
        # what lies between the parameters; bitsandbytes' CPU code takes 0 for another code than 0's
        assert name == "adamw8bit" or not steps.flat.values.any()


NAME = "step-00000003"


@pytest.mark.parametrize("name, args", CASES)
def test_the_first_step_makes_no_state(name, args):
    """Its memory is taken before a pass's, and nothing is moved by that."""
    steps = Steps(settings(name, **args), flat=True)
    assert same(steps.parameters, odd_parameters()) and not steps.flat.gradients.any()

    def storages() -> set[int]:
        _, tensors = flatten_state(steps.optimizer.state_dict())
        return {t.untyped_storage()._cdata for t in tensors.values() if t.ndim}

    before = storages()
    steps.take(range(1))
    assert before and storages() == before


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_waits_at_most_twice_and_is_few_launches(monkeypatch):
    """However many parameters there are."""
    import bitsandbytes.optim.optimizer as library

    steps = {name: Steps(settings(name), flat=True) for name in ("adamw", "adamw8bit", "prodigy")}
    waits = []
    monkeypatch.setattr(library, "sync_gpu", waits.append)
    with Calls() as calls:
        for each in steps.values():
            each.optimizer.step()
        Ema(steps["adamw"].flat, 0.9).update(torch.tensor(0.0))
    assert calls.counts["_fused_adamw_"] == calls.counts["lerp_"] == 1
    assert calls.counts["_local_scalar_dense"] == 2  # prodigy's
    assert len(waits) == 2  # of the large parameters and the small ones


def test_a_piece_is_counted_in_32_bits(monkeypatch):
    monkeypatch.setattr(fluxfast.optim, "MOST", 8192)
    train = settings("adamw8bit")
    flat = FlatParameters(odd_parameters(), train)
    assert [len(piece) for piece in flat.pieces] == [8192, 4352, 6144, 5376]
    optimizer = build_optimizer(train, flat)
    flat.load_state_dict(optimizer, flat.state_dict(optimizer))
    optimizer.step()
