"""What `bench.compile` compiles: every kernel of fluxfast_kernels in every shipped configuration.

A tile's cases take all options, which is the most likely to spill, and few. `bench.tune` asks with
`tile_cases` for those of a tile that no row ships yet. The process must not interpret Triton.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from fluxfast_kernels.dispatch import dispatch
from fluxfast_kernels.dispatch.attention import AttentionTile, shipped_to
from fluxfast_kernels.dispatch.backend import Matrix, tl
from fluxfast_kernels.gemm import dense, eight_bit, grads
from fluxfast_kernels.gemm.epilogue import After, Outputs, Part, Spec, Update
from fluxfast_kernels.ops import (
    attention,
    flow_loss,
    gate_residual,
    gelu,
    norm_modulate,
    qk_norm_rope,
)
from fluxfast_kernels.quant import frozen, hadamard, nf4, rows
from fluxfast_kernels.quant.rows import TOP

DTYPES = ("bf16", "fp16", "fp32")
CODES = {"int8": "i8", "fp8": "fp8e4nv"}
LEAST_ARCH = {"int8": 80, "fp8": 89}
Tile = dispatch.Tile | AttentionTile
Archs = tuple[int, ...] | None


class KernelCase(NamedTuple):
    """One kernel in one configuration.

    signature: Triton type per run-time argument ("*bf16", "*fp32", "i32", "fp32", or a tuple of
    such);
    constants: value per constexpr argument, None for a pointer that is absent; matrix: whether it
    must use tensor cores; least_arch: the oldest compute capability that has what it needs;
    archs: those whose rows choose it, None for all.
    """

    name: str
    fn: object
    signature: dict[str, object]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    matrix: bool = False
    least_arch: int = 80
    archs: Archs = None


def _case(
    name: str,
    kernel,
    types: Mapping[str, object],
    constants: Mapping[str, object],
    absent: Iterable[str] = (),
    **options,
) -> KernelCase:
    """types: of what is no i32. absent: pointers that are None."""
    constants = {**constants, **dict.fromkeys(absent)}
    signature = {arg: types.get(arg, "i32") for arg in kernel.arg_names if arg not in constants}
    return KernelCase(name, kernel, signature, constants, **options)


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
    yield from _gate_residual_cases()
    yield from _frozen_cases()


def tile_cases(op: str, storage: str, dtype: str, tile: Tile, archs: Archs = None):
    """The cases of one tile. op, storage and dtype: as in the rows of dispatch; attention's
    kernels by the names in `attention.json`, in "dense", "half"."""
    if op == "qk_norm_rope":
        return _qk_norm_rope_cases(128, tile, archs)
    if op in attention.KERNELS:
        return _attention_cases(op, 128, "bf16", tile, archs)
    family = {
        "lora_gemm": _gemm_cases,
        "lora_gemm_dx": _gemm_cases,
        "lora_skinny": _skinny_cases,
        "lora_grads": _skinny_cases,
        "lora_skinny_8bit": _quantizing_cases,
    }
    return family.get(op, _gemm_8bit_cases)(op, storage, dtype, tile, archs)


def _shipped_attention() -> Iterator[KernelCase]:
    for kernel in attention.KERNELS:
        for C in attention.WIDTHS:
            for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
                for tile, archs in shipped_to(kernel, dtype, C).items():
                    yield from _attention_cases(kernel, C, name, tile, archs)
    for C in (64, 128):
        shipped = shipped_to("qk_norm_rope", torch.bfloat16, C)
        for tile, archs in shipped.items():
            yield from _qk_norm_rope_cases(C, tile, archs)


def _attention_cases(kernel: str, C: int, dtype: str, tile, archs: Archs) -> Iterator[KernelCase]:
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
            archs=archs,
        )


def _qk_norm_rope_cases(C: int, tile, archs: Archs) -> Iterator[KernelCase]:
    types = _pointers("q_ptr k_ptr v_ptr q_scale_ptr k_scale_ptr dqkv_ptr", "bf16")
    types |= dict.fromkeys(("dq", "dk", "dv"), attention.Heads("*bf16", "i32", "i32", "i32"))
    types |= {"qkv": _matrix("bf16"), "cos": _matrix("fp32"), "sin_ptr": "*fp32"}
    constants = {"C": C, "ROWS": tile.block_m, "EPSILON": qk_norm_rope.EPSILON}
    name = f"{C} {tile.block_m} w{tile.num_warps}"
    options = {"num_warps": tile.num_warps, "archs": archs}
    forward, backward = qk_norm_rope._forward_kernel, qk_norm_rope._backward_kernel
    copying = constants | {"COPY_V": True}
    yield _case(f"qk_norm_rope forward {name}", forward, types, copying, **options)
    yield _case(f"qk_norm_rope backward {name}", backward, types, constants, **options)


def _shipped_gemm() -> Iterator[KernelCase]:
    for op in dispatch.OPS:
        is_8bit, is_skinny = (
            "gemm_8bit" in op,
            op in ("lora_skinny", "lora_grads", "lora_skinny_8bit"),
        )
        for dtype in CODES if is_8bit else ("half", "fp32"):
            for storage in ("dense",) if is_skinny else dispatch.STORAGES:
                for tile, archs in dispatch.shipped_to(op, storage, dtype).items():
                    yield from tile_cases(op, storage, dtype, tile, archs)


def _tile_name(*sizes: int, tile: dispatch.Tile) -> str:
    return f"{'x'.join(map(str, sizes))}.{tile.num_warps}w{tile.num_stages}"


def _options(tile: dispatch.Tile, archs: Archs, matrix: bool) -> dict[str, object]:
    return tile.options | {"archs": archs, "matrix": matrix}


def _epilogue(dtype: str, full: bool, forward: bool) -> tuple[dict[str, object], int, tuple]:
    """What follows a product, its rank and parts. full: two outputs, rank 128, forward also q, k
    and v as parts, a gate and a residual."""
    after = After(Update(f"*{dtype}", "i32", "*fp32", "i32", "i32", "fp32"))
    if forward:
        after = after._replace(bias_ptr=f"*{dtype}")
    parts = ()
    if full and forward:
        parts = tuple(Part(3072 * i, 3072 * (i + 1), i, 3072 * i) for i in range(3))
        after = after._replace(gate_ptr=f"*{dtype}", gate_stride="i32", residual=_matrix(dtype))
    out = Outputs(_matrix(dtype), _matrix(dtype) if full else None, "i32")
    return {"after": after, "out": out}, 128 if full else 16, parts


def _gemm_cases(
    op: str, storage: str, dtype: str, tile: dispatch.Tile, archs: Archs
) -> Iterator[KernelCase]:
    for kind in ("bf16", "fp16") if dtype == "half" else ("fp32",):
        for full in (True, False) if kind != "fp16" else (False,):
            yield _gemm_case(op, kind, storage, tile, full, archs)


def _gemm_case(
    op: str, dtype: str, storage: str, tile: dispatch.Tile, full: bool, archs: Archs
) -> KernelCase:
    """full: rank 128, two inputs and outputs, masks, nested absmax; forward also parts, a gate."""
    forward = op == "lora_gemm"
    types, rank, parts = _epilogue(dtype, full, forward)
    if storage == "dense":
        weight = dense.Weight(f"*{dtype}", "i32")
    elif full:
        statistics = ("*u8", "*fp32", "*fp32", "*fp32", "*fp32")
        weight = dense.Weight("*u8", "i32", *statistics)
    else:
        weight = dense.Weight("*u8", "i32", "*fp32", code="*fp32")
    types |= {"x0": _matrix(dtype), "x1": _matrix(dtype) if full else None, "w": weight}
    shape = _tile_name(tile.block_m, tile.block_n, tile.block_k, tile=tile)
    return _case(
        f"{op}.{dtype}.{storage}.{shape}{'.full' * full}",
        dense._gemm_kernel,
        types,
        {"SPEC": Spec(tile, rank, parts, forward, full, full)},
        **_options(tile, archs, dtype != "fp32"),
    )


def _gemm_8bit_cases(
    op: str, storage: str, kind: str, tile: dispatch.Tile, archs: Archs
) -> Iterator[KernelCase]:
    """Forward in bf16 and fp32; towards x with the weight as it is stored and transposed, two
    inputs with all options."""
    forward, full = op == "gemm_8bit", op == "gemm_8bit_dx_pair"
    if forward:
        yield gemm_8bit_case(op, kind, storage, tile, True, True, archs)
    yield gemm_8bit_case(op, kind, storage, tile, full, forward, archs)
    if not full:
        yield gemm_8bit_case(op, kind, storage, tile, False, forward, archs, "fp32")
    if not forward and storage == "dense":
        yield gemm_8bit_case(op, kind, storage, tile, full, True, archs)


def gemm_8bit_case(
    op: str,
    kind: str,
    storage: str,
    tile: dispatch.Tile,
    full: bool,
    transposed: bool,
    archs: Archs = None,
    dtype: str = "bf16",
    with_update: bool = True,
) -> KernelCase:
    """full: rank 128, two inputs and outputs, masks; forward also parts and a gate."""
    forward, code = op == "gemm_8bit", f"*{CODES[kind]}"
    types, rank, parts = _epilogue(dtype, full, forward)
    if not with_update:
        types["after"], rank = types["after"]._replace(update=None), 0
    weight = dense.Weight(code, "i32", scale_ptr="*fp32" if forward else None)
    if storage == "nf4":
        weight = weight._replace(ptr="*u8", absmax_ptr="*fp32", code="*fp32", inverse_ptr="*fp32")
    row = rows.RowsPointer(code, "*fp32")
    types |= {"x0": row, "x1": row if full else None, "w": weight}
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
        least_arch=LEAST_ARCH[kind],
        **_options(tile, archs, True),
    )


def _skinny_types(dtype: str, second_input: bool) -> dict[str, object]:
    types = {"x0": _matrix(dtype), "x1": _matrix(dtype) if second_input else None}
    types |= {"w": grads.Strided("*fp32", "i32", "i32"), "channel_ptr": "*fp32", "scale": "fp32"}
    return types | {"out": grads.Strided(f"*{dtype}", "i32", "i32")}


def _skinny_cases(
    op: str, storage: str, dtype: str, tile: dispatch.Tile, archs: Archs
) -> Iterator[KernelCase]:
    """At ranks 128, 48 (three parts of 16) and 16 over K or N of 3072."""
    shape = _tile_name(tile.block_m, tile.block_k, tile=tile)
    whole = (grads.Segment(0, 0, 3072, 0, 0),)
    for kind in ("bf16", "fp16") if dtype == "half" else ("fp32",):
        for rank in (128, 48, 16):
            cut = grads.fitted(tile, rank)
            if op == "lora_skinny":
                kernel, types = grads._skinny_kernel, _skinny_types(kind, False)
                types |= dict.fromkeys(("rows0", "rows1", "channel_ptr"))
                spec = grads.SkinnySpec(cut, rank, whole, 1, 127.0, 0, grads.BLOCK_Q)
            else:
                kernel, spec = grads._grads_kernel, grads.GradsSpec(cut, rank, whole)
                types = {"x": _matrix(kind), "skinny": grads.Strided(f"*{kind}", "i32", "i32")}
                types |= {"out": grads.Strided("*fp32", "i32", "i32"), "scale": "fp32"}
            options = _options(tile, archs, kind != "fp32")
            yield _case(f"{op}.{kind}.r{rank}.{shape}", kernel, types, {"SPEC": spec}, **options)


def _quantizing_cases(
    op: str, storage: str, dtype: str, tile: dispatch.Tile, archs: Archs
) -> Iterator[KernelCase]:
    """The skinny product that writes 8-bit rows. x: two inputs, the first quantized and rotated;
    dy: two of three parts, both with scales."""
    shape = _tile_name(tile.block_m, tile.block_k, tile=tile)
    of_x = (grads.Segment(0, 0, 3072, 0, 0), grads.Segment(1, 0, 12288, 0, 3072))
    of_dy = (
        grads.Segment(0, 0, 3072, 0, 0),
        grads.Segment(0, 3072, 6144, 1, 3072),
        grads.Segment(1, 0, 12288, 2, 6144),
    )
    for dtype_ in ("bf16", "fp16") if dtype == "half" else ("fp32",):
        for kind, code in CODES.items():
            row = rows.RowsPointer(f"*{code}", "*fp32")
            both = _skinny_types(dtype_, True) | {"rows0": row, "rows1": row}
            first = both | dict.fromkeys(("rows1", "channel_ptr"))
            for side, types, rank, *spec in (
                ("x", first, 48, of_x, 1, TOP[kind], 256, 256),
                ("dy", both, 16, of_dy, 3, TOP[kind], 0, grads.BLOCK_Q),
            ):
                yield _case(
                    f"{op}.{kind}.{dtype_}.{side}.{shape}",
                    grads._skinny_kernel,
                    types,
                    {"SPEC": grads.SkinnySpec(grads.fitted(tile, rank), rank, *spec)},
                    least_arch=LEAST_ARCH[kind],
                    **_options(tile, archs, dtype_ != "fp32"),
                )


def _flow_cases(dtype: str) -> Iterator[KernelCase]:
    types = _pointers("prediction_ptr gradient_ptr d_prediction_ptr noisy_ptr", dtype)
    fp32 = "mean std vae_noise noise t target mask partial weight loss factor d_loss"
    types |= _pointers(" ".join(f"{name}_ptr" for name in fp32.split()), "fp32")
    block = {"BLOCK": flow_loss.BLOCK}
    yield _case(f"flow_mix_{dtype}", flow_loss._mix_kernel, types, block)
    for masked in (False, True):
        name = f"flow_loss_{dtype}{'_masked' * masked}"
        absent = () if masked else ("mask_ptr",)
        constants = block | {"CHUNK": flow_loss.CHUNK}
        yield _case(name, flow_loss._loss_kernel, types, constants, absent)
    yield _case(f"flow_loss_backward_{dtype}", flow_loss._loss_backward_kernel, types, block)
    if dtype == "fp32":
        for present in (False, True):
            constants = {"HAS_MASK": present, "BLOCK": flow_loss.SUM_BLOCK}
            name = f"flow_loss_sum{'_weighted' * present}"
            absent = () if present else ("weight_ptr",)
            yield _case(name, flow_loss._loss_sum_kernel, types, constants, absent)


def _gelu_cases(dtype: str) -> Iterator[KernelCase]:
    x = _matrix(dtype)
    for is_8bit in (False, True):
        types = dict.fromkeys(("x", "dx", "du"), x) | {"u": _matrix("i8") if is_8bit else x}
        types["row_scale_ptr"] = "*fp32" if is_8bit else None
        name, block = f"{dtype}{'_codes' * is_8bit}", {"BLOCK": gelu.BLOCK}
        yield _case(f"gelu_{name}", gelu._gelu_kernel, types, block)
        yield _case(f"gelu_backward_{name}", gelu._gelu_backward_kernel, types, block)
    for kind in ("", *CODES):
        for saves, rotation in ((True, 0), (False, 0), (False, 256)):
            if not kind and not saves:
                continue
            types = {"u": x, "x": x, "saved": rows.RowsPointer("*i8", "*fp32") if saves else None}
            types["rows"] = rows.RowsPointer(f"*{CODES[kind]}", "*fp32") if kind else None
            constants = {"TOP": TOP[kind or "int8"], "ROTATION": rotation}
            yield _case(
                f"gelu_rows_{dtype}{'_codes' * saves}{f'_{kind}' * bool(kind)}_{rotation}",
                gelu._gelu_rows_kernel,
                types,
                constants | {"BLOCK": gelu.ROW_BLOCK},
                num_warps=8,
                least_arch=LEAST_ARCH[kind or "int8"],
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
        for kind, code in CODES.items():
            for rotation in (0, min(256, D)):
                tokens, columns, warps_8bit = norm_modulate.tile(D, rotation)
                spec_8bit = norm_modulate.Spec(D, tokens, columns, False, TOP[kind], rotation)
                yield _case(
                    f"norm_modulate {kind} {rotation} {dtype} {D}",
                    kernel,
                    types | {"rows": rows.RowsPointer(f"*{code}", "*fp32")},
                    {"SPEC": spec_8bit},
                    num_warps=warps_8bit,
                    least_arch=LEAST_ARCH[kind],
                )
        for has_dh, has_sums in ((True, False), (True, True), (False, True)):
            given = {"dh_ptr": f"*{dtype}" if has_dh else None}
            given["sums_ptr"] = "*fp32" if has_sums else None
            yield _case(
                f"norm_modulate_backward {'dh ' * has_dh}{'sums ' * has_sums}{dtype} {D}",
                norm_modulate._norm_modulate_backward_kernel,
                types | given,
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
            constants = shape | {"STEPS": gate_residual.STEPS if has_dgate else 1}
            yield _case(
                f"gate_residual_backward {'dy ' * has_dy}{'dgate ' * has_dgate}{dtype} {D}",
                gate_residual._backward_kernel,
                types,
                constants,
                [*(() if has_dy else ("gate_ptr", "gate_stride", "dy_ptr"))]
                + [*(() if has_dgate else ("y", "partial_ptr"))],
            )


def _rows_cases(dtype: str) -> Iterator[KernelCase]:
    for kind, code in CODES.items():
        types = {"values_ptr": f"*{code}", "scale_ptr": "*fp32", "x": _matrix(dtype)}
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
                least_arch=LEAST_ARCH[kind],
            )


def _frozen_cases() -> Iterator[KernelCase]:
    types = {"packed_ptr": "*u8"} | _pointers("absmax_ptr code_ptr scale_ptr", "fp32")
    for kind, code in CODES.items():
        for transposed in (False, True):
            for groups in (64, 256):
                constants = {"GROUPS": groups, "TOP": TOP[kind], "TRANSPOSED": transposed}
                yield _case(
                    f"nf4_codes.{kind}.{groups}{'.transposed' * transposed}",
                    frozen._nf4_to_8bit_kernel,
                    types | {"out_ptr": f"*{code}"},
                    constants | {"ROWS": frozen.ROWS, "SPAN": frozen.SPAN},
                    least_arch=LEAST_ARCH[kind],
                )
    constants = {"ROWS": frozen.ROWS, "COLUMNS": frozen.COLUMNS}
    types = _pointers("in_ptr out_ptr", "u8")
    yield _case("transpose_codes", frozen._transpose_kernel, types, constants)
