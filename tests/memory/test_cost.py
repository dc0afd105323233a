"""The cost model beside what others count: torch's FLOP counter over diffusers' blocks, tensors'
bytes, the parameters that injection makes."""

import math
from dataclasses import replace

import fluxfast_kernels as fk
import pytest
import torch
from small import SMALL, random_flux
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fluxfast.errors import ConfigError
from fluxfast.memory.planner import cost
from fluxfast.memory.planner.cards import card
from fluxfast.memory.planner.choose import policy_ops
from fluxfast.memory.planner.cost import (
    Op,
    attention_op,
    block_ops,
    linear_op,
    modulation_ops,
    optimizer_ops,
    seconds,
    step_ops,
    total_bytes,
    total_flop,
    total_seconds,
)
from fluxfast.memory.planner.saved_bytes import block_saved
from fluxfast.memory.planner.step_spec import Lora, Shape, StepSpec, lora_of, shape_of
from fluxfast.model.lora import inject_lora
from fluxfast.model.precision import linears
from fluxfast.model.spec import DEV

ONE_EACH = replace(DEV, depth=1, depth_single_blocks=1)
BLOCKS = ("double_blocks.0", "single_blocks.0")


def spec_of(storage="bf16", compute="bf16", spec=ONE_EACH, activations="bf16", **other) -> StepSpec:
    return StepSpec(
        spec, storage, compute, activations, other.pop("lora", lora_of(spec, 16)), **other
    )


def products(ops: list[Op], *without: str) -> list[Op]:
    """Matrix products and attention: what torch counts."""
    return [op for op in ops if op.kind != "element" and not op.name.endswith(without)]


# ---------------------------------------------------------------- FLOP


@pytest.fixture(scope="module")
def diffusers_blocks():
    """diffusers' full-width blocks with peft's LoRA of rank 16 on attention and MLP, on meta."""
    from diffusers.models.transformers import transformer_flux
    from peft import LoraConfig, inject_adapter_in_model

    targets = "to_q to_k to_v add_q_proj add_k_proj add_v_proj to_out.0 to_add_out net.0.proj net.2"
    config = LoraConfig(r=16, target_modules=[*targets.split(), "proj_mlp", "proj_out"])
    with torch.device("meta"):
        double = transformer_flux.FluxTransformerBlock(3072, 24, 128)
        single = transformer_flux.FluxSingleTransformerBlock(3072, 24, 128)
    blocks = [
        inject_adapter_in_model(config, block.requires_grad_(False)) for block in (double, single)
    ]
    return dict(zip(BLOCKS, blocks, strict=True))


def counted(block, shape: Shape) -> tuple[int, int]:
    """Returns the FLOP forward and backward of products, as torch counts them."""
    with torch.device("meta"):
        tokens = (shape.image_tokens, shape.text_tokens)
        img, txt = (torch.randn(shape.batch, n, 3072, requires_grad=True) for n in tokens)
        temb = torch.randn(shape.batch, 3072)  # modulation is frozen: no gradient goes there
        rope = torch.randn(shape.tokens, 128), torch.randn(shape.tokens, 128)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        made = block(img, txt, temb, rope)
        forward = counter.get_total_flops()
        sum(each.sum() for each in made).backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.grid(3)
@pytest.mark.parametrize("shape", [Shape(1, 256, 128), Shape(2, 256, 128), Shape(2, 1024, 512)])
@pytest.mark.parametrize("block", BLOCKS)
def test_flop_are_those_of_diffusers_blocks(diffusers_blocks, block, shape):
    """Where the two differ: diffusers' block has its modulation linears inside; the MATH backend
    keeps the scores that flash recomputes; peft keeps x·Aᵀ, which our backward recomputes."""
    ours = block_ops(spec_of(), block, shape, recompute_scores=False)
    inside = [
        op for op in modulation_ops(spec_of(), shape.batch).forward if op.name.startswith(block)
    ]
    forward, backward = counted(diffusers_blocks[block], shape)
    assert total_flop(products(ours.forward + inside)) == pytest.approx(forward, rel=1e-4)
    assert total_flop(products(ours.backward, "down again")) == pytest.approx(backward, rel=1e-4)
    # and whole, without taking anything out
    whole = total_flop(products(ours.forward + inside + ours.backward))
    assert whole == pytest.approx(forward + backward, rel=0.01)


def test_flash_computes_the_scores_again():
    shape = Shape(2, 1024, 512)
    for block in BLOCKS:
        flash, saved = (
            block_ops(spec_of(), block, shape, recompute).backward for recompute in (True, False)
        )
        assert total_flop(flash) - total_flop(saved) == 2 * 2 * 1536**2 * 3072


def test_recomputing_the_mlp_is_a_part_of_the_forward():
    D, F, M, step = 3072, 12288, 2 * 384, spec_of()
    for block, rows in (("double_blocks.0", F), ("single_blocks.0", 3 * D + F)):
        ops = block_ops(step, block, Shape(2, 256, 128))
        assert set(ops.recompute_mlp) < set(ops.forward)
        assert total_flop(products(ops.recompute_mlp, "down", "up")) == 2 * M * D * rows
        norms = [op.name for op in ops.recompute_mlp if op.name.endswith("norm")]
        assert len(norms) == (2 if block.startswith("double") else 1)


# ---------------------------------------------------------------- bytes


def size(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_bytes_are_those_of_the_tensors():
    M, N, K, R = 48, 256, 128, 4
    x, y = (torch.empty(M, width, dtype=torch.bfloat16) for width in (K, N))
    a, b = torch.empty(2 * R, K), torch.empty(N, R)
    nf4 = list(fk.nf4_quantize(torch.randn(N, K)).tensors().values())
    op = linear_op("", "bf16", M, N, K, cost.NF4, 2, (2, N, R))
    assert op.bytes == size(x, y, a, b, *nf4)

    q = torch.empty(2, 24, 100, 32, dtype=torch.bfloat16)
    assert attention_op(2, 100, 24 * 32, 2).bytes == size(*[q] * 4)
    assert attention_op(2, 100, 24 * 32, 2, 5).bytes == size(*[q] * 8)

    # of everything a block saves but u
    step, shape = spec_of(spec=SMALL), Shape(1, 64, 16)
    own = block_ops(step, "single_blocks.0", shape)
    (pack, _), (unpack,) = policy_ops(step, shape, "single_blocks.0", "int8", own)
    count = block_saved(step, "single_blocks.0", shape, "keep").device // 2 - 80 * SMALL.mlp_hidden
    saved = torch.empty(count, dtype=torch.bfloat16)
    assert pack.bytes == unpack.bytes == size(saved, saved.to(torch.int8)) + 4 * count / 128


@pytest.mark.parametrize("storage", ["bf16", "nf4", "int8", "fp8"])
@pytest.mark.parametrize("compute", ["bf16", "int8", "fp8"])
def test_a_weight_is_decoded_or_transposed_for_its_product(storage, compute):
    """Bytes of the pass that writes what the product reads, against real weights' bytes."""
    if {storage, compute} == {"int8", "fp8"}:
        return
    name, N, K = "single_blocks.0.linear1", 448, 64  # of SMALL
    W = torch.randn(N, K)
    stored = {"bf16": [W.bfloat16()], "nf4": list(fk.nf4_quantize(W).tensors().values())}
    stored |= {kind: list(fk.quantize_8bit(W, kind)) for kind in ("int8", "fp8")}
    bare = Lora(4, {})
    for tokens in (128, 4096):  # from 2048 rows 8-bit weights are transposed towards x
        shape = Shape(1, tokens - 16, 16)
        ops = block_ops(spec_of(storage, compute, SMALL, lora=bare), "single_blocks.0", shape)
        for side, product in ((ops.forward, "product"), (ops.backward, "dx")):
            by_name = {
                op.name.removeprefix(f"{name} "): op for op in side if op.name.startswith(name)
            }
            each = 2 if compute == "bf16" else 1
            expected = 0 if storage == compute else size(*stored[storage]) + each * N * K
            if storage == compute != "bf16" and product == "dx" and tokens == 4096:
                expected = 2 * N * K
            passes = [op.bytes for key, op in by_name.items() if key in ("decode", "transpose")]
            assert passes == ([expected] if expected else [])
            # the product: its operand and the weight in `each` bytes, y (or dx) in bf16
            wide, narrow = (K, N) if product == "product" else (N, K)
            scales = 4 * N if storage == compute != "bf16" and not passes else 0
            moved = tokens * (each * wide + 2 * narrow) + each * N * K + scales
            assert by_name[product].bytes == moved


def test_where_nf4_does_not_fit_bf16_is_kept():
    spec = replace(SMALL, hidden_size=96, num_heads=3)  # K 96 is no multiple of 64, mlp's 384 is
    layers = {"single_blocks.1.linear2": "bf16"}
    model = random_flux(spec, "nf4", "bf16", layers=layers)
    step = spec_of("nf4", "bf16", spec, layers=layers)
    stored = {name: model.get_submodule(name).storage() for name in linears(spec)}
    assert {name: step.stored_as(name) for name in linears(spec)} == stored
    assert {stored["double_blocks.0.img_mlp.2"], stored["img_in"]} == {"nf4", "bf16"}


def test_dropout_draws_a_mask_in_each_direction():
    plain, dropped = spec_of(), spec_of(dropout=True)
    for block in BLOCKS:
        ops = block_ops(dropped, block, Shape(1, 256, 128))
        for side in (ops.forward, ops.backward):
            drawn = sum(op.name.endswith("masked") and op.launches == 1 for op in side)
            assert drawn == (8 if block.startswith("double") else 2)
        before = block_ops(plain, block, Shape(1, 256, 128))
        extra = total_flop(products(ops.backward)) - total_flop(products(before.backward))
        assert extra == 0  # element-wise work alone


# ---------------------------------------------------------------- LoRA and optimizer


@pytest.mark.parametrize("share_a", [False, True])
@pytest.mark.parametrize(
    "targets, include, exclude",
    [
        ("attn", [], []),
        ("attn+mlp", [], []),
        ("all", [], []),
        ("attn+mlp", ["single_blocks.*"], ["proj_mlp", "to_k"]),
    ],
)
def test_parameters_are_those_that_injection_makes(targets, include, exclude, share_a):
    chosen = {"include": include, "exclude": exclude, "share_a": share_a}
    made = inject_lora(random_flux(SMALL), rank=3, targets=targets, **chosen)
    lora = lora_of(SMALL, 3, targets, **chosen)
    assert lora.parameters == sum(p.numel() for p in made)
    assert 2 * len(lora.modules) == len(made)


def test_an_update_costs_only_where_it_is():
    shape = Shape(1, 256, 128)
    attention = spec_of(lora=lora_of(ONE_EACH, 16, "attn"))
    of_mlp = [op for op in _both(attention, shape) if "mlp" in op.name or "linear2" in op.name]
    names = {op.name.split(" ", 1)[1] for op in of_mlp}
    assert names.isdisjoint({"down", "up", "down again", "d_down", "dA", "dB", "dx up"})
    assert names.isdisjoint(
        {"norm again", "gelu again"}
    )  # rebuilt for the update's gradients alone
    # linear1 has q, k and v, not the MLP's rows
    (up,) = [op for op in _both(attention, shape) if op.name == "single_blocks.0.linear1 up"]
    assert up.flop == 2 * 384 * 16 * 3 * 3072


def _both(step: StepSpec, shape: Shape) -> list[Op]:
    blocks = [block_ops(step, block, shape) for block in BLOCKS]
    return [op for ops in blocks for op in ops.forward + ops.backward]


def test_trained_modulation_keeps_y_and_trains_its_linears():
    frozen, trained = spec_of(), spec_of(lora=lora_of(ONE_EACH, 16, "all"))
    shape = Shape(1, 256, 128)
    assert not modulation_ops(frozen, 1).backward
    names = [op.name for op in modulation_ops(trained, 1).backward]
    assert sum(name.endswith("dA") for name in names) == 3
    assert not any(name.endswith("dx") for name in names)  # nothing before them is trained
    # h + gate · y in a pass of its own: y is read and the sum written, forward; y read, backward
    more = [total_bytes(_both(step, shape)) for step in (frozen, trained)]
    assert more[1] - more[0] == 3 * 384 * 3072 * 2 * (2 + 1)


def test_an_optimizer_moves_its_states():
    model = random_flux(SMALL)
    parameters = inject_lora(model, rank=4)
    step = spec_of(spec=SMALL, lora=lora_of(SMALL, 4))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    states = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    gradients = [p.grad for p in parameters]
    moved = size(*parameters, *gradients, *states) + size(*parameters, *states)
    (adamw,) = optimizer_ops(step, "adamw", guard=False)
    assert adamw.bytes == moved
    averaged = optimizer_ops(step, "adamw", ema=True, guard=False)
    assert total_bytes(averaged) - adamw.bytes == 3 * size(*parameters)
    (eight,) = optimizer_ops(step, "adamw8bit", guard=False)
    assert eight.bytes < 0.6 * adamw.bytes


# ---------------------------------------------------------------- time and errors


def test_time_is_the_longer_of_products_and_memory():
    gpu = card("4090")
    by_flop, by_bytes = Op("", "bf16", 1e12, 1e6), Op("", "bf16", 1e9, 1e9, 2)
    assert seconds(by_flop, gpu) == pytest.approx(1e12 / (165.2e12 * 0.909))
    assert seconds(by_bytes, gpu) == pytest.approx(1e9 / (1008e9 * 0.91))
    assert seconds(by_bytes, gpu, launches=True) - seconds(by_bytes, gpu) == pytest.approx(1e-5)
    assert seconds(Op("", "copy", 0, 25e9), gpu) == pytest.approx(1)
    assert seconds(Op("", "element", 1.0, 1008e9), gpu) == pytest.approx(1 / 0.91)
    fast, slow = (
        seconds(Op("", "attention_" + way, 1e12, 0), gpu) for way in ("forward", "backward")
    )
    assert slow / fast == pytest.approx(0.909 / 0.697)


def test_products_that_a_card_lacks_are_an_error():
    ops = step_ops(spec_of("nf4", "fp8"), Shape(1, 256, 128))
    assert math.isfinite(total_seconds(ops, card("4090")))
    with pytest.raises(ConfigError, match="RTX 3090 has no fp8"):
        total_seconds(ops, card("3090"))


def test_shapes_in_tokens():
    assert shape_of(1024, 768, 2, 512) == Shape(2, 64 * 48, 512)
    with pytest.raises(ConfigError, match="multiples of 16"):
        shape_of(1000, 1024, 1, 512)
