"""Makes Triton's CPU interpreter compute bf16, and round to e4m3, as the hardware does.

Under TRITON_INTERPRET=1 (Triton 3.4 to 3.9) a bf16 value is kept as its 16 bits, and arithmetic is
done on those as integers: arithmetic, comparisons and `tl.dot` are silently wrong, and a store
from fp32 truncates. So does a cast to e4m3 (fp8e4nv): one unit in the last place off for half of
the values. `install()` replaces four methods of the interpreter: bf16 and e4m3 operands are widened
to fp32, results are rounded to the nearest even.

    os.environ["TRITON_INTERPRET"] = "1"      # before the kernels are imported
    triton_bf16.install()

Reductions and fma on bf16 (and unary minus on 3.9) stay wrong: a kernel upcasts on load and lets
only `tl.dot` see bf16. Inline asm, libdevice and bf16 atomics fail with an error.
"""

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter


def _widen(handle):
    """bf16 bits -> fp32 values."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _round(values):
    """fp32 values -> bf16 bits, nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _is_e4m3(handle):
    return handle.dtype.scalar == tl.float8e4nv


def _widen_e4m3(handle):
    """e4m3 bits -> fp32 values."""
    bits = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.uint8))
    return bits.view(torch.float8_e4m3fn).float().numpy()


def _round_e4m3(values):
    """fp32 values -> e4m3 bits, nearest even."""
    values = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def install():
    """Patches the interpreter's builder in place, once."""
    builder, handle_type = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "_bf16_as_hardware", False):
        return
    binary_op, cast_impl = builder.binary_op, builder.cast_impl
    create_dot, fp_to_fp = builder.create_dot, builder.create_fp_to_fp

    def values(handle):
        if _is_e4m3(handle):
            return _widen_e4m3(handle)
        return _widen(handle) if _is_bf16(handle) else handle.data

    def new_binary_op(self, left, right, op):
        if not (_is_bf16(left) or _is_bf16(right)):
            return binary_op(self, left, right, op)
        out = op(values(left), values(right))
        return (
            handle_type(out, tl.int1)
            if out.dtype == np.bool_
            else handle_type(_round(out), tl.bfloat16)
        )

    def new_cast(self, src, dst_type):
        src_type, dst = src.dtype.scalar, dst_type.scalar
        if dst == tl.bfloat16 and src_type != tl.bfloat16:
            return handle_type(_round(src.data.astype(np.float32)), tl.bfloat16)
        if src_type == tl.bfloat16 and dst != tl.bfloat16:
            return handle_type(_widen(src).astype(interpreter._get_np_dtype(dst_type)), dst)
        if dst == tl.float8e4nv and src_type.is_floating() and src_type != dst:
            return handle_type(_round_e4m3(values(src)), dst)
        if src_type == tl.float8e4nv and dst.is_floating() and src_type != dst:
            return handle_type(_widen_e4m3(src).astype(interpreter._get_np_dtype(dst_type)), dst)
        return cast_impl(self, src, dst_type)

    def new_fp_to_fp(self, src, dst_type, rounding):
        if {tl.bfloat16, tl.float8e4nv} & {src.dtype.scalar, dst_type.scalar}:
            return new_cast(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding)

    def new_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        if not any(_is_bf16(x) or _is_e4m3(x) for x in (a, b)):
            return create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc)
        return handle_type(
            np.matmul(values(a), values(b), dtype=np.float32) + acc.data, acc.dtype.scalar
        )

    builder.binary_op, builder.cast_impl = new_binary_op, new_cast
    builder.create_fp_to_fp, builder.create_dot = new_fp_to_fp, new_dot
    builder._bf16_as_hardware = True
