"""What `bench.compile` compiles: every kernel of fluxfast_kernels in every shipped configuration.

A tile's cases take all options, which is the most likely to spill, and few. `bench.tune` asks with
`tile_cases` for those of a tile that no row ships yet. The process must not interpret Triton.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.attention import AttentionTile, shipped_to
from fluxfast_kernels.dispatch.backend import Matrix, tl
from fluxfast_kernels.gemm import dense, eight_bit, grads
from fluxfast_kernels.gemm.epilogue import After, Outputs, Part, Spec, Update
from fluxfast_kernels.ops import (
    attention,
    dropout,
    flow_loss,
    gate_residual,
    gelu,
    norm_modulate,
    qk_norm_rope,
)
from fluxfast_kernels.quant import frozen, hadamard, nf4, rows
from fluxfast_kernels.quant.rows import TOP

DTYPES = ("bf16", "fp16", "fp32")
TYPES_8BIT = {"int8": "i8", "fp8": "fp8e4nv"}
FP8_ARCH = 89  # the oldest compute capability that has fp8
SKINNY = ("lora_skinny", "lora_grads", "lora_skinny_8bit")
Tile = dispatch.Tile | AttentionTile


class KernelCase(NamedTuple):
    """One kernel in one configuration.

    signature: Triton type per run-time argument ("*bf16", "*fp32", "i32", "fp32", or a tuple of
    such); constants: value per constexpr argument, None for a pointer that is absent; matrix:
    whether it must use tensor cores; least_arch: the oldest compute capability that has what it
    needs; archs: those whose rows choose it, None for all.
    """

    name: str
    fn: object
    signature: dict[str, object]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    matrix: bool = False
    least_arch: int = 80
    archs: tuple[int, ...] | None = None


def _case(
    name: str,
    kernel,
    types: Mapping[str, object],
    constants: dict[str, object],
    **options,
) -> KernelCase:
    """types: of what is no i32; None of what is absent."""
    signature = {arg: types.get(arg, "i32") for arg in kernel.arg_names if arg not in constants}
    least_arch = FP8_ARCH if TYPES_8BIT["fp8"] in str(signature) else 80
    return KernelCase(name, kernel, signature, constants, least_arch=least_arch, **options)


def _matrix(dtype: str) -> Matrix:
    return Matrix(f"*{dtype}", "i32", "i32")


def _pointers(names: str, dtype: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), f"*{dtype}")


def cases() -> Iterator[KernelCase]:
    """Every kernel of the package in every configuration that it ships with."""
    yield from _shipped_attention()
    yield from _shipped_gemm()
    for dtype in DTYPES:
        yield from _flow_cases(dtype)
        yield from _gelu_cases(dtype)
        yield from _norm_modulate_cases(dtype)
        yield from _rows_cases(dtype)
        types = {"packed_ptr": "*u8", "absmax_ptr": "*fp32", "code_ptr": "*fp32"}
        types["out_ptr"] = f"*{dtype}"
        blocks = {"BLOCKS": nf4.BLOCKS}
        kernel = nf4._dequantize_kernel
        yield _case(f"nf4_dequantize.{dtype}", kernel, types, blocks, num_warps=nf4.WARPS)
        if dtype != "fp16":
            types = _pointers("x_ptr y_ptr", dtype)
            blocks = {"ROTATION": hadamard.LARGEST, "BLOCK": hadamard.BLOCK}
            yield _case(f"hadamard.{dtype}", hadamard._rotate_kernel, types, blocks)
        types = dict.fromkeys(("x", "out"), _matrix(dtype)) | {"indices_ptr": "*i64"}
        types |= {"key": "i64", "scale": "fp32"} | dict.fromkeys(("threshold", "T", "K"), "i32")
        shape = {"ADD": True, "BLOCK": dropout.BLOCK}
        yield _case(f"dropout.{dtype}", dropout._dropout_kernel, types, shape)
    yield from _gate_residual_cases()
    yield from _frozen_cases()


def tile_cases(op: str, storage: str, dtype: str, tile: Tile) -> Iterator[KernelCase]:
    """The cases of one tile. op, storage and dtype: as in the rows of dispatch; attention's
    kernels by the names in `attention.json`, in "dense", "half"."""
    if op == "qk_norm_rope":
        return _qk_norm_rope_cases(128, tile)
    if op in attention.KERNELS:
        return _attention_cases(op, 128, "bf16", tile)
    if op == "lora_skinny_8bit":
        return _quantizing_cases(dtype, tile)
    if op in SKINNY:
        return _skinny_cases(op, dtype, tile)
    if op in ("lora_gemm", "lora_gemm_dx"):
        return _gemm_cases(op, storage, dtype, tile)
    return _gemm_8bit_cases(op, storage, dtype, tile)


def _shipped_attention() -> Iterator[KernelCase]:
    for kernel in attention.KERNELS:
        for C in attention.WIDTHS:
            for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
                for tile, archs in shipped_to(kernel, dtype, C).items():
                    for case in _attention_cases(kernel, C, name, tile):
                        yield case._replace(archs=archs)
    for C in (64, 128):
        for tile, archs in shipped_to("qk_norm_rope", torch.bfloat16, C).items():
            for case in _qk_norm_rope_cases(C, tile):
                yield case._replace(archs=archs)


def _attention_cases(kernel: str, C: int, dtype: str, tile) -> Iterator[KernelCase]:
    """With queries or keys past T in the last block, and without at C=128."""
    tensor = attention.Heads(f"*{dtype}", "i32", "i32", "i32")
    types = dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), tensor)
    types |= _pointers("lse_ptr delta_ptr", "fp32") | {"scale": "fp32"}
    constants = {"C": C, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    constants["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
    blocks = f"{tile.block_m}x{tile.block_n} w{tile.num_warps}s{tile.num_stages}"
    for tail in (True, False) if C == 128 and dtype == "bf16" else (True,):
        yield _case(
            f"attention {kernel} {C} {dtype} {blocks}{'' if tail else ' even'}",
            attention.KERNELS[kernel],
            types,
            constants | {"TAIL": tail},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            matrix=dtype != "fp32",
        )


def _qk_norm_rope_cases(C: int, tile) -> Iterator[KernelCase]:
    types = _pointers("q_ptr k_ptr v_ptr q_scale_ptr k_scale_ptr dqkv_ptr", "bf16")
    types |= dict.fromkeys(("dq", "dk", "dv"), attention.Heads("*bf16", "i32", "i32", "i32"))
    types |= {"qkv": _matrix("bf16"), "cos": _matrix("fp32"), "sin_ptr": "*fp32"}
    constants = {"C": C, "ROWS": tile.block_m, "EPSILON": qk_norm_rope.EPSILON}
    for way, kernel, more in (
        ("forward", qk_norm_rope._forward_kernel, {"COPY_V": True}),
        ("backward", qk_norm_rope._backward_kernel, {}),
    ):
        name = f"qk_norm_rope {way} {C} {tile.block_m} w{tile.num_warps}"
        yield _case(name, kernel, types, constants | more, num_warps=tile.num_warps)


def _shipped_gemm() -> Iterator[KernelCase]:
    for op in dispatch.OPS:
        for dtype in TYPES_8BIT if "gemm_8bit" in op else ("half", "fp32"):
            for storage in ("dense",) if op in SKINNY else dispatch.STORAGES:
                for tile, archs in dispatch.shipped_to(op, storage, dtype).items():
                    for case in tile_cases(op, storage, dtype, tile):
                        yield case._replace(archs=archs)


def _tile_name(*sizes: int, tile: dispatch.Tile) -> str:
    return f"{'x'.join(map(str, sizes))}.{tile.num_warps}w{tile.num_stages}"


def _float_types(dtype: str) -> tuple[str, ...]:
    return ("bf16", "fp16") if dtype == "half" else ("fp32",)


def _epilogue(dtype: str, full: bool, forward: bool) -> tuple[dict[str, object], int, tuple]:
    """What follows a product, its rank and parts. full: two outputs, rank 128, forward also q, k
    and v as parts, a gate and a residual."""
    after = After(Update(f"*{dtype}", "i32", "*fp32", "i32", "i32", "fp32", "i32"))
    if forward:
        after = after._replace(bias_ptr=f"*{dtype}")
    parts = ()
    if full and forward:
        parts = tuple(Part(3072 * i, 3072 * (i + 1), i, 3072 * i) for i in range(3))
        after = after._replace(gate_ptr=f"*{dtype}", gate_stride="i32", residual=_matrix(dtype))
    out = Outputs(_matrix(dtype), _matrix(dtype) if full else None, "i32")
    return {"after": after, "out": out}, 128 if full else 16, parts


def _gemm_cases(op: str, storage: str, dtype: str, tile: dispatch.Tile) -> Iterator[KernelCase]:
    """full: rank 128, two inputs and outputs, masks, nested absmax; forward also parts, a gate."""
    forward = op == "lora_gemm"
    shape = _tile_name(tile.block_m, tile.block_n, tile.block_k, tile=tile)
    for kind in _float_types(dtype):
        for full in (True, False) if kind != "fp16" else (False,):
            types, rank, parts = _epilogue(kind, full, forward)
            weight = dense.Weight("*u8", "i32", "*fp32", code="*fp32")
            if storage == "dense":
                weight = dense.Weight(f"*{kind}", "i32")
            elif full:
                weight = dense.Weight("*u8", "i32", "*u8", *["*fp32"] * 4)
            types |= {"x0": _matrix(kind), "x1": _matrix(kind) if full else None, "w": weight}
            yield _case(
                f"{op}.{kind}.{storage}.{shape}{'.full' * full}",
                dense._gemm_kernel,
                types,
                {"SPEC": Spec(tile, rank, parts, forward, full, full)},
                matrix=kind != "fp32",
                **tile.options,
            )


def _gemm_8bit_cases(op: str, storage: str, kind: str, tile: dispatch.Tile) -> Iterator[KernelCase]:
    """Forward in bf16 and fp32; towards x with the weight as it is stored and transposed, two
    inputs with all options."""
    forward, full = "dx" not in op, op.endswith("_pair")
    if forward and not full:
        yield gemm_8bit_case(op, kind, storage, tile, True, True)
    yield gemm_8bit_case(op, kind, storage, tile, full, forward)
    if not full:
        yield gemm_8bit_case(op, kind, storage, tile, False, forward, "fp32")
    if not forward and storage == "dense":
        yield gemm_8bit_case(op, kind, storage, tile, full, True)


def gemm_8bit_case(
    op: str,
    kind: str,
    storage: str,
    tile: dispatch.Tile,
    full: bool,
    transposed: bool,
    dtype: str = "bf16",
    with_update: bool = True,
) -> KernelCase:
    """full: rank 128, two outputs, masks; forward also parts and a gate."""
    forward, pointer = "dx" not in op, f"*{TYPES_8BIT[kind]}"
    types, rank, parts = _epilogue(dtype, full, forward)
    if not with_update:
        types["after"], rank = types["after"]._replace(update=None), 0
    weight = dense.Weight(pointer, "i32", scale_ptr="*fp32" if forward else None)
    if storage == "nf4":
        weight = weight._replace(ptr="*u8", absmax_ptr="*fp32", code="*fp32", inverse_ptr="*fp32")
    row = rows.RowsPointer(pointer, "*fp32")
    types |= {"x0": row, "x1": row if op.endswith("_pair") else None, "w": weight}
    spec = Spec(tile, rank, parts, transposed, full, top=TOP[kind])
    sum_dtype = tl.int32 if kind == "int8" else tl.float32
    update_dtype = tl.bfloat16 if dtype == "bf16" else tl.float32
    shape = _tile_name(tile.block_m, tile.block_n, tile.block_k, tile=tile)
    layout = "" if forward else ".transposed" if transposed else ".as_kept"
    return _case(
        f"{op}.{kind}.{storage}{layout}.{shape}{'.full' * full}{'.fp32' * (dtype == 'fp32')}",
        eight_bit._gemm_8bit_kernel,
        types,
        {"SPEC": spec._replace(sum=sum_dtype, update_dtype=update_dtype)},
        matrix=True,
        **tile.options,
    )


def _skinny_types(dtype: str, second_input: bool) -> dict[str, object]:
    types = {"x0": _matrix(dtype), "x1": _matrix(dtype) if second_input else None}
    types |= {"w": grads.Strided("*fp32", "i32", "i32"), "channel_ptr": "*fp32", "scale": "fp32"}
    return types | {"out": grads.Strided(f"*{dtype}", "i32", "i32")}


def _skinny_cases(op: str, dtype: str, tile: dispatch.Tile) -> Iterator[KernelCase]:
    """At ranks 128, 48 (three parts of 16) and 16 over K or N of 3072."""
    shape = _tile_name(tile.block_m, tile.block_k, tile=tile)
    whole = (grads.Segment(0, 0, 3072, 0, 0),)
    for kind in _float_types(dtype):
        for rank in (128, 48, 16):
            cut = grads.fitted(tile, rank)
            if op == "lora_skinny":
                kernel, types = grads._skinny_kernel, _skinny_types(kind, False)
                types |= dict.fromkeys(("rows0", "rows1", "channel_ptr"))
                spec = grads.SkinnySpec(cut, rank, whole, 1, 127.0, 0, grads.BLOCK_Q)
            else:
                kernel, spec = grads._grads_kernel, grads.GradsSpec(cut, rank, whole, False)
                types = {"x": _matrix(kind), "skinny": grads.Strided(f"*{kind}", "i32", "i32")}
                types |= {"out": grads.Strided("*fp32", "i32", "i32"), "scale": "fp32"}
            options = {"matrix": kind != "fp32", **tile.options}
            yield _case(f"{op}.{kind}.r{rank}.{shape}", kernel, types, {"SPEC": spec}, **options)


def _quantizing_cases(dtype: str, tile: dispatch.Tile) -> Iterator[KernelCase]:
    """The skinny product that writes 8-bit rows. x: two inputs, the first quantized and rotated;
    dy: two of three parts, both with scales."""
    shape = _tile_name(tile.block_m, tile.block_k, tile=tile)
    of_x = (grads.Segment(0, 0, 3072, 0, 0), grads.Segment(1, 0, 12288, 0, 3072))
    of_dy = (
        grads.Segment(0, 0, 3072, 0, 0),
        grads.Segment(0, 3072, 6144, 1, 3072),
        grads.Segment(1, 0, 12288, 2, 6144),
    )
    for float_type in _float_types(dtype):
        for kind, type_8bit in TYPES_8BIT.items():
            row = rows.RowsPointer(f"*{type_8bit}", "*fp32")
            both = _skinny_types(float_type, True) | {"rows0": row, "rows1": row}
            first = both | dict.fromkeys(("rows1", "channel_ptr"))
            for side, types, rank, *spec in (
                ("x", first, 48, of_x, 1, TOP[kind], 256, 256),
                ("dy", both, 16, of_dy, 3, TOP[kind], 0, grads.BLOCK_Q),
            ):
                yield _case(
                    f"lora_skinny_8bit.{kind}.{float_type}.{side}.{shape}",
                    grads._skinny_kernel,
                    types,
                    {"SPEC": grads.SkinnySpec(grads.fitted(tile, rank), rank, *spec)},
                    matrix=float_type != "fp32",
                    **tile.options,
                )


def _flow_cases(dtype: str) -> Iterator[KernelCase]:
    types = _pointers("prediction_ptr gradient_ptr d_prediction_ptr noisy_ptr", dtype)
    fp32 = "mean std vae_noise noise t target mask partial weight loss factor d_loss"
    types |= _pointers(" ".join(f"{name}_ptr" for name in fp32.split()), "fp32")
    block = {"BLOCK": flow_loss.BLOCK}
    yield _case(f"flow_mix_{dtype}", flow_loss._mix_kernel, types, block)
    for masked in (False, True):
        name = f"flow_loss_{dtype}{'_masked' * masked}"
        mask = types | {"mask_ptr": "*fp32" if masked else None}
        yield _case(name, flow_loss._loss_kernel, mask, block | {"CHUNK": flow_loss.CHUNK})
    yield _case(f"flow_loss_backward_{dtype}", flow_loss._loss_backward_kernel, types, block)
    if dtype == "fp32":
        for present in (False, True):
            constants = {"HAS_MASK": present, "BLOCK": flow_loss.SUM_BLOCK}
            name = f"flow_loss_sum{'_weighted' * present}"
            weight = types | {"weight_ptr": "*fp32" if present else None}
            yield _case(name, flow_loss._loss_sum_kernel, weight, constants)


def _gelu_cases(dtype: str) -> Iterator[KernelCase]:
    x = _matrix(dtype)
    for is_8bit in (False, True):
        types = dict.fromkeys(("x", "dx", "du"), x) | {"u": _matrix("i8") if is_8bit else x}
        types["row_scale_ptr"] = "*fp32" if is_8bit else None
        name, block = f"{dtype}{'_codes' * is_8bit}", {"BLOCK": gelu.BLOCK}
        yield _case(f"gelu_{name}", gelu._gelu_kernel, types, block)
        yield _case(f"gelu_backward_{name}", gelu._gelu_backward_kernel, types, block)
    for kind in ("", *TYPES_8BIT):
        for saves, rotation in ((True, 0), (False, 0), (False, 256)):
            if not kind and not saves:
                continue
            types = {"u": x, "x": x, "saved": rows.RowsPointer("*i8", "*fp32") if saves else None}
            types["rows"] = rows.RowsPointer(f"*{TYPES_8BIT[kind]}", "*fp32") if kind else None
            constants = {"TOP": TOP[kind or "int8"], "ROTATION": rotation}
            yield _case(
                f"gelu_rows_{dtype}{'_codes' * saves}{f'_{kind}' * bool(kind)}_{rotation}",
                gelu._gelu_rows_kernel,
                types,
                constants | {"BLOCK": gelu.ROW_BLOCK},
                num_warps=8,
            )


def _norm_modulate_cases(dtype: str) -> Iterator[KernelCase]:
    """FLUX's width, and in bf16 the ends of what is tested."""
    types = dict.fromkeys(("h", "shift", "scale", "dx"), _matrix(dtype))
    types |= {"x_ptr": f"*{dtype}"} | _pointers("mean_ptr rstd_ptr", "fp32")
    kernel = norm_modulate._norm_modulate_kernel
    for D in (3072, 128, 4096) if dtype == "bf16" else (3072,):
        tokens, columns, warps = norm_modulate.tile(D)
        spec = norm_modulate.Spec(D, tokens, columns)
        for recompute in (False, True):
            name = f"norm_modulate {'rebuild ' * recompute}{dtype} {D}"
            constants = {"SPEC": spec._replace(recompute=recompute)}
            yield _case(name, kernel, types | {"rows": None}, constants, num_warps=warps)
        for kind, type_8bit in TYPES_8BIT.items():
            for rotation in (0, min(256, D)):
                tokens, columns, warps_8bit = norm_modulate.tile(D, rotation)
                spec_8bit = norm_modulate.Spec(D, tokens, columns, False, TOP[kind], rotation)
                yield _case(
                    f"norm_modulate {kind} {rotation} {dtype} {D}",
                    kernel,
                    types | {"rows": rows.RowsPointer(f"*{type_8bit}", "*fp32")},
                    {"SPEC": spec_8bit},
                    num_warps=warps_8bit,
                )
        for has_dh, has_sums in ((True, False), (True, True), (False, True)):
            inputs = {"dh_ptr": f"*{dtype}" if has_dh else None}
            inputs["sums_ptr"] = "*fp32" if has_sums else None
            yield _case(
                f"norm_modulate_backward {'dh ' * has_dh}{'sums ' * has_sums}{dtype} {D}",
                norm_modulate._norm_modulate_backward_kernel,
                types | inputs,
                {"SPEC": spec, "STEPS": norm_modulate.STEPS if has_sums else 1},
                num_warps=warps,
            )


def _gate_residual_cases() -> Iterator[KernelCase]:
    """FLUX's width in bf16 and fp32, and a head-sized one."""
    for dtype, D in (("bf16", 3072), ("fp32", 3072), ("bf16", 128)):
        tokens, block = gate_residual.tile(D)
        shape = {"D": D, "ROWS": tokens, "BLOCK": block}
        types = _pointers("gate_ptr out_ptr dy_ptr", dtype) | {"partial_ptr": "*fp32"}
        types |= dict.fromkeys(("h", "y", "dout"), _matrix(dtype))
        yield _case(f"gate_residual {dtype} {D}", gate_residual._forward_kernel, types, shape)
        for has_dy, has_dgate in ((True, False), (True, True), (False, True)):
            absent = () if has_dy else ("gate_ptr", "gate_stride", "dy_ptr")
            absent += () if has_dgate else ("y", "partial_ptr")
            yield _case(
                f"gate_residual_backward {'dy ' * has_dy}{'dgate ' * has_dgate}{dtype} {D}",
                gate_residual._backward_kernel,
                types | dict.fromkeys(absent),
                shape | {"STEPS": gate_residual.STEPS if has_dgate else 1},
            )


def _rows_cases(dtype: str) -> Iterator[KernelCase]:
    for kind, type_8bit in TYPES_8BIT.items():
        types = {"values_ptr": f"*{type_8bit}", "scale_ptr": "*fp32", "x": _matrix(dtype)}
        gated = {"gate": _matrix(dtype), "channel_ptr": "*fp32", "dy_ptr": f"*{dtype}"}
        for name, rotation, block in (
            ("plain", 0, rows.BLOCK),
            ("short", 0, 128),
            ("rotated", 256, rows.BLOCK),
            ("gated", 0, rows.BLOCK),
        ):
            yield _case(
                f"quantize_rows.{kind}.{dtype}.{name}",
                rows._quantize_kernel,
                types | (gated if name == "gated" else dict.fromkeys(gated)),
                {"TOP": TOP[kind], "ROTATION": rotation, "BLOCK": block},
                num_warps=rows.warps(block),
            )


def _frozen_cases() -> Iterator[KernelCase]:
    types = {"packed_ptr": "*u8"} | _pointers("absmax_ptr code_ptr scale_ptr", "fp32")
    for kind, type_8bit in TYPES_8BIT.items():
        for transposed in (False, True):
            for groups in (64, 256):
                constants = {"GROUPS": groups, "TOP": TOP[kind], "TRANSPOSED": transposed}
                yield _case(
                    f"nf4_codes.{kind}.{groups}{'.transposed' * transposed}",
                    frozen._nf4_to_8bit_kernel,
                    types | {"out_ptr": f"*{type_8bit}"},
                    constants | {"ROWS": frozen.ROWS, "SPAN": frozen.SPAN},
                )
    constants = {"ROWS": frozen.ROWS, "COLUMNS": frozen.COLUMNS}
    types = _pointers("in_ptr out_ptr", "u8")
    yield _case("transpose_codes", frozen._transpose_kernel, types, constants)
