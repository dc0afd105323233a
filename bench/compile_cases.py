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
from fluxfast_kernels.gemm.epilogue import rank_block
from fluxfast_kernels.ops import (
    attention,
    flow_loss,
    gate_residual,
    gelu_triton,
    norm_modulate_triton,
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
        types = {"packed": "*u8", "absmax": "*fp32", "code": "*fp32", "out": f"*{dtype}"}
        blocks = {"BLOCKS": nf4.BLOCKS}
        yield _case(f"nf4_decode.{dtype}", nf4._decode_kernel, types, blocks, num_warps=nf4.WARPS)
        if dtype != "fp16":
            types = _pointers("X Y", dtype)
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


def _blocks(tile: dispatch.Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}


def _tile_name(*sizes: int, tile: dispatch.Tile) -> str:
    return f"{'x'.join(map(str, sizes))}.{tile.num_warps}w{tile.num_stages}"


def _options(tile: dispatch.Tile, archs: Archs, matrix: bool) -> dict[str, object]:
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return options | {"archs": archs, "matrix": matrix}


def _update(full: bool, with_parts: bool) -> dict[str, object]:
    """Constants of the LoRA update in an epilogue: rank 128 or 16, q, k and v as parts."""
    three = (0, 3072, 0, 0, 3072, 6144, 1, 3072, 6144, 9216, 2, 6144)
    rank, parts = 128 if full else 16, three if with_parts else ()
    block = {"RANK": rank, "BLOCK_R": rank_block(rank)}
    return block | {"PARTS": parts, "PART_COUNT": len(parts) // 4}


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
    forward, is_nf4 = op == "lora_gemm", storage == "nf4"
    types = _pointers("x0 x1 bias down gate residual y0 y1", dtype) | {"scale": "fp32"}
    types |= _pointers("nested offset code table up", "fp32")
    types |= {"w": "*u8" if is_nf4 else f"*{dtype}"}
    types |= {"absmax": "*u8" if is_nf4 and full else "*fp32"}
    absent = [] if is_nf4 else ["absmax", "code"]
    absent += [] if is_nf4 and full else ["nested", "offset", "table"]
    absent += [] if full else ["x1", "y1"]
    absent += [] if full and forward else ["gate", "residual"]
    absent += [] if forward else ["bias"]
    constants = {"TRANSPOSED": forward, "MASKED": full, "OFFSETS": full, "GROUP_M": tile.group_m}
    constants |= _update(full, full and forward) | _blocks(tile)
    shape = _tile_name(tile.block_m, tile.block_n, tile.block_k, tile=tile)
    return _case(
        f"{op}.{dtype}.{storage}.{shape}{'.full' * full}",
        dense._gemm_kernel,
        types,
        constants,
        absent,
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
) -> KernelCase:
    """full: rank 128, two inputs and outputs, masks; forward also parts and a gate."""
    forward, is_nf4 = op == "gemm_8bit", storage == "nf4"
    types = _pointers("bias down gate residual y0 y1", dtype) | {"scale": "fp32"}
    types |= _pointers("s0 s1 w_scale absmax code inverse up", "fp32")
    types |= _pointers("x0 x1 w", CODES[kind])
    types |= {"w": "*u8"} if is_nf4 else {}
    absent = [] if is_nf4 else ["absmax", "code", "inverse"]
    absent += [] if full else ["x1", "s1", "y1"]
    absent += [] if full and forward else ["gate", "residual"]
    absent += [] if forward else ["w_scale", "bias"]
    constants = {"TRANSPOSED": transposed, "MASKED": full, "TOP": TOP[kind]}
    constants |= {"SUM": tl.int32 if kind == "int8" else tl.float32, "GROUP_M": tile.group_m}
    constants |= {"PRODUCT": tl.bfloat16 if dtype == "bf16" else tl.float32}
    constants |= _update(full, full and forward) | _blocks(tile)
    shape = _tile_name(tile.block_m, tile.block_n, tile.block_k, tile=tile)
    layout = "" if forward else ".transposed" if transposed else ".as_kept"
    return _case(
        f"{op}.{kind}.{storage}{layout}.{shape}{'.full' * full}{'.fp32' * (dtype == 'fp32')}",
        eight_bit._gemm_8bit_kernel,
        types,
        constants,
        absent,
        least_arch=LEAST_ARCH[kind],
        **_options(tile, archs, True),
    )


def _skinny_cases(
    op: str, storage: str, dtype: str, tile: dispatch.Tile, archs: Archs
) -> Iterator[KernelCase]:
    """At ranks 128, 48 (three parts of 16) and 16 over K or N of 3072."""
    shape = _tile_name(tile.block_m, tile.block_k, tile=tile)
    for kind in ("bf16", "fp16") if dtype == "half" else ("fp32",):
        types = _pointers("x0 x out skinny", kind) | {"w": "*fp32", "scale": "fp32"}
        if op == "lora_grads":
            types["out"] = "*fp32"
        for rank in (128, 48, 16):
            constants = _blocks(tile) | {"RANK": rank, "SEGMENTS": (0, 0, 3072, 0, 0)}
            constants["BLOCK_N"] = grads._power_of_two(rank, tile.block_n)
            constants["SEGMENT_COUNT"] = 1
            kernel, absent = grads._grads_kernel, ()
            if op == "lora_skinny":
                kernel = grads._skinny_kernel
                absent = ("x1", "codes0", "codes1", "scale0", "scale1", "channel")
                constants |= {"SLOTS": 1, "TOP": 127.0, "ROTATION": 0}
                constants["BLOCK_Q"] = grads.BLOCK_Q
            name = f"{op}.{kind}.r{rank}.{shape}"
            options = _options(tile, archs, kind != "fp32")
            yield _case(name, kernel, types, constants, absent, **options)


def _quantizing_cases(
    op: str, storage: str, dtype: str, tile: dispatch.Tile, archs: Archs
) -> Iterator[KernelCase]:
    """The skinny product that writes 8-bit rows. x: two inputs, the first quantized and rotated;
    dy: two of three parts, both with scales."""
    shape = _tile_name(tile.block_m, tile.block_k, tile=tile)
    x_segments = (0, 0, 3072, 0, 0, 1, 0, 12288, 0, 3072)
    dy_segments = (0, 0, 3072, 0, 0, 0, 3072, 6144, 1, 3072, 1, 0, 12288, 2, 6144)
    x_constants = {"RANK": 48, "SLOTS": 1, "ROTATION": 256, "BLOCK_Q": 256}
    dy_constants = {"RANK": 16, "SLOTS": 3, "ROTATION": 0, "BLOCK_Q": grads.BLOCK_Q}
    for dtype_ in ("bf16", "fp16") if dtype == "half" else ("fp32",):
        for kind, code in CODES.items():
            types = _pointers("x0 x1 out", dtype_) | _pointers("codes0 codes1", code)
            types |= _pointers("w scale0 scale1 channel", "fp32") | {"scale": "fp32"}
            for side, segments, own, absent in (
                ("x", x_segments, x_constants, ("codes1", "scale1", "channel")),
                ("dy", dy_segments, dy_constants, ()),
            ):
                constants = _blocks(tile) | own | {"TOP": TOP[kind], "SEGMENTS": segments}
                constants["SEGMENT_COUNT"] = len(segments) // 5
                constants["BLOCK_N"] = grads._power_of_two(own["RANK"], tile.block_n)
                yield _case(
                    f"{op}.{kind}.{dtype_}.{side}.{shape}",
                    grads._skinny_kernel,
                    types,
                    constants,
                    absent,
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
    types = _pointers("U X DX DU", dtype) | _pointers("ROW_SCALE X_SCALE", "fp32")
    for is_codes in (False, True):
        own = types | ({"U": "*i8"} if is_codes else {})
        constants = {"CODES": is_codes, "BLOCK": gelu_triton.BLOCK}
        name = f"{dtype}{'_codes' * is_codes}"
        yield _case(f"gelu_{name}", gelu_triton._gelu_kernel, own, constants)
        yield _case(f"gelu_backward_{name}", gelu_triton._gelu_backward_kernel, own, constants)
    for kind in ("", *CODES):
        for saves_codes, rotation in ((True, 0), (False, 0), (False, 256)):
            if not kind and not saves_codes:
                continue
            own = types | {"CODE": "*i8", "X_CODE": f"*{CODES[kind or 'int8']}"}
            constants = {"TOP": TOP[kind or "int8"], "ROTATION": rotation}
            yield _case(
                f"gelu_rows_{dtype}{'_codes' * saves_codes}{f'_{kind}' * bool(kind)}_{rotation}",
                gelu_triton._gelu_rows_kernel,
                own,
                constants | {"BLOCK": gelu_triton.ROW_BLOCK},
                [*(() if saves_codes else ("CODE", "ROW_SCALE"))]
                + [*(() if kind else ("X_CODE", "X_SCALE"))],
                num_warps=8,
                least_arch=LEAST_ARCH[kind or "int8"],
            )


def _norm_modulate_cases(dtype: str) -> Iterator[KernelCase]:
    """FLUX's width, and in bf16 the ends of what is tested."""
    types = _pointers("H SHIFT SCALE X DX DH", dtype)
    types |= _pointers("MEAN RSTD PARTIAL ROW_SCALE", "fp32")
    kernel = norm_modulate_triton._norm_modulate_kernel
    backward = norm_modulate_triton._norm_modulate_backward_kernel
    for D in (3072, 128, 4096) if dtype == "bf16" else (3072,):
        tokens, block, warps = norm_modulate_triton.tile(D)
        shape = {"D": D, "ROWS": tokens, "BLOCK": block}
        constants = shape | {"EPS": norm_modulate_triton.EPS, "TOP": 127.0, "ROTATION": 0}
        for rebuild in (False, True):
            name = f"norm_modulate {'rebuild ' * rebuild}{dtype} {D}"
            own = constants | {"REBUILD": rebuild}
            yield _case(name, kernel, types, own, ("CODES", "ROW_SCALE"), num_warps=warps)
        for kind, code in CODES.items():
            for rotation in (0, min(256, D)):
                tokens, block, warps_8bit = norm_modulate_triton.tile(D, rotation)
                own = constants | {"ROWS": tokens, "BLOCK": block, "REBUILD": False}
                yield _case(
                    f"norm_modulate {kind} {rotation} {dtype} {D}",
                    kernel,
                    types | {"CODES": f"*{code}"},
                    own | {"TOP": TOP[kind], "ROTATION": rotation},
                    num_warps=warps_8bit,
                    least_arch=LEAST_ARCH[kind],
                )
        for has_dh, has_sums in ((True, False), (True, True), (False, True)):
            own = shape | {"STEPS": norm_modulate_triton.STEPS if has_sums else 1}
            yield _case(
                f"norm_modulate_backward {'dh ' * has_dh}{'sums ' * has_sums}{dtype} {D}",
                backward,
                types,
                own | {"HAS_DH": has_dh, "HAS_SUMS": has_sums},
                [*(() if has_dh else ("DH",)), *(() if has_sums else ("PARTIAL",))],
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
        types = _pointers("X GATE DY", dtype) | _pointers("CHANNEL SCALE", "fp32")
        types |= _pointers("CODES", code)
        for name, rotation, block in (
            ("plain", 0, rows.BLOCK),
            ("short", 0, 128),
            ("rotated", 256, rows.BLOCK),
            ("gated", 0, rows.BLOCK),
        ):
            yield _case(
                f"quantize_rows.{kind}.{dtype}.{name}",
                rows._quantize_kernel,
                types,
                {"TOP": TOP[kind], "ROTATION": rotation, "BLOCK": block},
                () if name == "gated" else ("GATE", "CHANNEL", "DY"),
                num_warps=rows.warps(block),
                least_arch=LEAST_ARCH[kind],
            )


def _frozen_cases() -> Iterator[KernelCase]:
    types = _pointers("packed", "u8") | _pointers("absmax code scale", "fp32")
    for kind, code in CODES.items():
        for transposed in (False, True):
            for groups in (64, 256):
                constants = {"GROUPS": groups, "TOP": TOP[kind], "TRANSPOSED": transposed}
                yield _case(
                    f"nf4_codes.{kind}.{groups}{'.transposed' * transposed}",
                    frozen._nf4_codes_kernel,
                    types | {"out": f"*{code}"},
                    constants | {"ROWS": frozen.ROWS, "SPAN": frozen.SPAN},
                    least_arch=LEAST_ARCH[kind],
                )
    constants = {"ROWS": frozen.ROWS, "COLUMNS": frozen.COLUMNS}
    types = _pointers("codes out", "u8")
    yield _case("transpose_codes", frozen._transpose_kernel, types, constants)
