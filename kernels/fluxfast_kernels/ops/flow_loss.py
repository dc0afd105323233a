"""Flow matching's noised input and its loss: two passes over packed latents; a dozen in eager.

    flow_mix   latent = mean + std·vae_noise
               x_t    = (1 − t)·latent + t·noise;  target = noise − latent
    flow_loss  loss[b] = weight[b] · Σ mask·(prediction − target)² / count[b]
               count[b] = T·C, or with a mask max(Σ mask, 1e-6)

Layouts: packed tokens [B, T, C], each sample contiguous; t, weight and the losses fp32 [B]. The
batch stride of `prediction` is free (the image tokens of a joint tensor, say). The rest is
contiguous. Everything is fp32 except x_t and prediction (fp32, bf16 or fp16).

`flow_loss` reads its inputs once. The same pass writes g = 2·mask·(prediction − target) in
prediction's dtype, if prediction requires a gradient: that is all that is saved, with weight/count
fp32 [B]. Backward is g·weight/count·d_loss: rounded twice, so in 2-byte dtypes it errs 1.41 times
as much as one rounding. g is saved unscaled because 1/count (4e-6 for 1024 px) would push it below
fp16's normal range. Sums: fp32, one partial sum per 4096 elements, then one program per sample adds
those up in a fixed order. No atomics: two runs agree in every bit.

Bytes an element, in fp32 with prediction in 2 bytes: flow_mix reads 16 (12 without std) and writes
8; flow_loss reads 6 (10 with a mask) and writes 2; backward reads 2 and writes 2. 7, 5 and 1 FLOP.

Refused with ValueError: other dtypes, shapes that differ, samples that are not contiguous, and
anything but prediction that requires a gradient. `flow_mix` has none.
Source: flow matching (arXiv 2210.02747) with the straight path of rectified flow (arXiv
2209.03003).
"""

import torch
from torch import Tensor

from fluxfast_kernels.dispatch import backend
from fluxfast_kernels.dispatch.backend import DTYPES, check, check_dtype, kernel, layout, tl, triton

BLOCK = 1024  # elements per program of the element-wise kernels
CHUNK = 4  # blocks per partial sum
SUM_BLOCK = 256  # partial sums per step of the second stage
LEAST_COUNT = 1e-6

_LEAST_COUNT = tl.constexpr(LEAST_COUNT)


# ---------------------------------------------------------------- kernels


@kernel
def _mix_kernel(
    mean_ptr,
    std_ptr,
    vae_noise_ptr,
    noise_ptr,
    t_ptr,
    noisy_ptr,
    target_ptr,
    size,
    BLOCK: tl.constexpr,
):
    """Grid (⌈size/BLOCK⌉, B). std_ptr may be None."""
    b = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    start = b.to(tl.int64) * size
    latent = tl.load(mean_ptr + start + i, mask=mask, other=0)
    vae_noise = tl.load(vae_noise_ptr + start + i, mask=mask, other=0)
    if std_ptr is not None:
        vae_noise *= tl.load(std_ptr + start + i, mask=mask, other=0)
    latent += vae_noise
    noise = tl.load(noise_ptr + start + i, mask=mask, other=0)
    t = tl.load(t_ptr + b)
    noisy = (1.0 - t) * latent + t * noise
    tl.store(noisy_ptr + start + i, noisy.to(noisy_ptr.dtype.element_ty), mask=mask)
    tl.store(target_ptr + start + i, noise - latent, mask=mask)


@kernel
def _loss_kernel(
    prediction_ptr,
    target_ptr,
    mask_ptr,
    gradient_ptr,
    partial_ptr,
    size,
    batch,
    prediction_stride,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (chunks, B). partial fp32 [2, B, chunks]: Σ mask·error² and, with a mask, Σ mask of each
    chunk. mask_ptr and gradient_ptr may be None."""
    chunk, b = tl.program_id(0), tl.program_id(1)
    start = b.to(tl.int64) * size
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for step in tl.static_range(CHUNK):
        i = (chunk * CHUNK + step) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        prediction_ptrs = prediction_ptr + b.to(tl.int64) * prediction_stride + i
        error = tl.load(prediction_ptrs, mask=inside, other=0).to(tl.float32)
        error -= tl.load(target_ptr + start + i, mask=inside, other=0)
        weighted = error
        if mask_ptr is not None:
            mask = tl.load(mask_ptr + start + i, mask=inside, other=0)
            weighted = error * mask
            count += mask
        total += weighted * error
        if gradient_ptr is not None:
            gradient = (2.0 * weighted).to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + start + i, gradient, mask=inside)
    chunks = tl.num_programs(0)
    tl.store(partial_ptr + b * chunks + chunk, tl.sum(total, axis=0))
    if mask_ptr is not None:
        tl.store(partial_ptr + (batch + b) * chunks + chunk, tl.sum(count, axis=0))


@kernel
def _loss_sum_kernel(
    partial_ptr,
    weight_ptr,
    loss_ptr,
    factor_ptr,
    size,
    batch,
    chunks,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B,): loss and factor = weight/count. weight_ptr may be None."""
    b = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for step in range(0, tl.cdiv(chunks, BLOCK)):
        i = step * BLOCK + tl.arange(0, BLOCK)
        inside = i < chunks
        total += tl.load(partial_ptr + b * chunks + i, mask=inside, other=0)
        if HAS_MASK:
            count += tl.load(partial_ptr + (batch + b) * chunks + i, mask=inside, other=0)
    divisor = tl.maximum(tl.sum(count, axis=0), _LEAST_COUNT) if HAS_MASK else size * 1.0
    weight = tl.load(weight_ptr + b) if weight_ptr is not None else 1.0
    tl.store(loss_ptr + b, tl.div_rn(tl.sum(total, axis=0), divisor) * weight)
    tl.store(factor_ptr + b, tl.div_rn(weight, divisor))


@kernel
def _loss_backward_kernel(
    gradient_ptr,
    factor_ptr,
    d_loss_ptr,
    d_prediction_ptr,
    size,
    d_loss_stride,
    BLOCK: tl.constexpr,
):
    """Grid (⌈size/BLOCK⌉, B)."""
    b = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    start = b.to(tl.int64) * size
    factor = tl.load(factor_ptr + b) * tl.load(d_loss_ptr + b * d_loss_stride)
    gradient = tl.load(gradient_ptr + start + i, mask=mask, other=0).to(tl.float32) * factor
    gradient = gradient.to(d_prediction_ptr.dtype.element_ty)
    tl.store(d_prediction_ptr + start + i, gradient, mask=mask)


# ---------------------------------------------------------------- launchers


def launch_mix(mean, std, vae_noise, noise, t, noisy: Tensor, target: Tensor) -> None:
    """Overwrites noisy and target."""
    B, size = mean.shape[0], mean[0].numel()
    _mix_kernel[triton.cdiv(size, BLOCK), B](
        mean, std, vae_noise, noise, t, noisy, target, size, BLOCK=BLOCK
    )


def launch_loss(prediction, target, weight, mask, gradient, loss, factor: Tensor) -> None:
    """Overwrites gradient (like prediction, contiguous, or None), loss and factor, fp32 [B]."""
    B, size = prediction.shape[0], prediction[0].numel()
    chunks = triton.cdiv(size, CHUNK * BLOCK)
    partial = torch.empty(2, B, chunks, dtype=torch.float32, device=prediction.device)
    stride = prediction.stride(0)
    _loss_kernel[chunks, B](
        prediction, target, mask, gradient, partial, size, B, stride, CHUNK=CHUNK, BLOCK=BLOCK
    )
    has_mask = mask is not None
    _loss_sum_kernel[(B,)](
        partial, weight, loss, factor, size, B, chunks, HAS_MASK=has_mask, BLOCK=SUM_BLOCK
    )


def launch_loss_backward(gradient, factor, d_loss, d_prediction: Tensor) -> None:
    """Overwrites d_prediction."""
    B, size = gradient.shape[0], gradient[0].numel()
    _loss_backward_kernel[triton.cdiv(size, BLOCK), B](
        gradient, factor, d_loss, d_prediction, size, d_loss.stride(0), BLOCK=BLOCK
    )


# ---------------------------------------------------------------- the ops


@torch.library.custom_op("fluxfast::flow_mix", mutates_args=())
def _flow_mix(
    mean: Tensor,
    std: Tensor | None,
    vae_noise: Tensor,
    noise: Tensor,
    t: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if not backend.launches(mean):
        return flow_mix_reference(mean, std, vae_noise, noise, t, dtype)
    noisy, target = torch.empty_like(mean, dtype=dtype), torch.empty_like(mean)
    launch_mix(mean, std, vae_noise, noise, t, noisy, target)
    return noisy, target


@_flow_mix.register_fake
def _(mean, std, vae_noise, noise, t, dtype):
    return torch.empty_like(mean, dtype=dtype), torch.empty_like(mean)


@torch.library.custom_op("fluxfast::flow_loss", mutates_args=())
def _flow_loss(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns losses fp32 [B]; g, empty unless needed; weight/count fp32 [B]."""
    B = prediction.shape[0]
    gradient = prediction.new_empty(prediction.shape if need_gradient else 0)
    if backend.launches(prediction):
        loss, factor = (prediction.new_empty(B, dtype=torch.float32) for _ in range(2))
        saved = gradient if need_gradient else None
        launch_loss(prediction, target, weight, mask, saved, loss, factor)
        return loss, gradient, factor
    error = prediction - target  # promotes to target's dtype
    weighted = error if mask is None else error * mask
    if need_gradient:
        torch.mul(weighted, 2, out=gradient)
    if mask is None:
        count = error.new_full((B,), error[0].numel())
    else:
        count = mask.sum(dim=(1, 2)).clamp_(min=LEAST_COUNT)
    loss = weighted.mul_(error).sum(dim=(1, 2)).div_(count)
    if weight is None:
        return loss, gradient, count.reciprocal_()
    return loss.mul_(weight), gradient, weight / count


@_flow_loss.register_fake
def _(prediction, target, weight, mask, need_gradient):
    B = prediction.shape[0]
    gradient = prediction.new_empty(prediction.shape if need_gradient else 0)
    return target.new_empty(B), gradient, target.new_empty(B)


@torch.library.custom_op("fluxfast::flow_loss_backward", mutates_args=())
def _flow_loss_backward(gradient: Tensor, factor: Tensor, d_loss: Tensor) -> Tensor:
    d_prediction = torch.empty_like(gradient)
    if backend.launches(gradient):
        launch_loss_backward(gradient, factor, d_loss, d_prediction)
        return d_prediction
    return torch.mul(gradient, (factor * d_loss)[:, None, None], out=d_prediction)


@_flow_loss_backward.register_fake
def _(gradient, factor, d_loss):
    return torch.empty_like(gradient)


def _setup_context(ctx, inputs, output):
    _, gradient, factor = output
    ctx.mark_non_differentiable(gradient, factor)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, factor)


def _backward(ctx, d_loss, *_):
    d_prediction = None if d_loss is None else _flow_loss_backward(*ctx.saved_tensors, d_loss)
    return d_prediction, None, None, None, None


_flow_loss.register_autograd(_backward, setup_context=_setup_context)


# ---------------------------------------------------------------- public


def flow_mix(
    mean: Tensor,
    std: Tensor | None,
    vae_noise: Tensor,
    noise: Tensor,
    t: Tensor,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Returns x_t [B, T, C] in `dtype` and target fp32 [B, T, C].

    mean, std (None counts as 1), vae_noise, noise: fp32 [B, T, C], contiguous; t: fp32 [B], 1 is
    pure noise. Raises ValueError naming the argument.
    """
    check(mean.ndim == 3, "mean", "[B, T, C]", tuple(mean.shape))
    named = {"mean": mean, "std": std, "vae_noise": vae_noise, "noise": noise}
    _check_data(named, tuple(mean.shape))
    _check_data({"t": t}, tuple(mean.shape[:1]))
    check(dtype in DTYPES, "dtype", "float32, bfloat16, float16", dtype)
    return _flow_mix(mean, std, vae_noise, noise, t, dtype)


def flow_loss(
    prediction: Tensor, target: Tensor, weight: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Returns losses fp32 [B]: weight · mean of mask·(prediction − target)², mask scaled to mean 1.

    prediction [B, T, C] in fp32, bf16 or fp16, each sample contiguous; target, mask fp32 [B, T, C],
    weight fp32 [B], contiguous. Differentiable in prediction, once. On a CPU fp64 is taken too,
    then throughout. Raises ValueError naming the argument.
    """
    shape, wide = tuple(prediction.shape), torch.float32
    if prediction.dtype == torch.float64 and not backend.launches(prediction):
        wide = torch.float64
    else:
        check_dtype("prediction", prediction)
    fits = prediction.ndim == 3 and prediction.stride()[1:] == (shape[2], 1)
    check(fits, "prediction", "[B, T, C], each sample contiguous", layout(prediction))
    _check_data({"target": target, "mask": mask}, shape, wide)
    _check_data({"weight": weight}, shape[:1], wide)
    need_gradient = prediction.requires_grad and torch.is_grad_enabled()
    return _flow_loss(prediction, target, weight, mask, need_gradient)[0]


def _check_data(named: dict, shape: tuple, dtype: torch.dtype = torch.float32) -> None:
    for name, tensor in named.items():
        if tensor is not None:
            check_dtype(name, tensor, (dtype,))
            fits = tensor.shape == shape and tensor.is_contiguous()
            check(fits, name, f"contiguous {shape}", layout(tensor))
            check(not tensor.requires_grad, name, "data", "a tensor that requires a gradient")


# ---------------------------------------------------------------- references


def flow_mix_reference(mean, std, vae_noise, noise, t, dtype=torch.float32):
    """`flow_mix` in plain torch."""
    latent = mean + vae_noise if std is None else (std * vae_noise).add_(mean)
    t = t[:, None, None]
    noisy = ((1 - t) * latent).add_(t * noise)
    return noisy.to(dtype), torch.sub(noise, latent, out=latent)


def flow_loss_reference(prediction, target, weight=None, mask=None) -> Tensor:
    """`flow_loss` in plain torch, differentiable by autograd."""
    error = (prediction - target).square()
    if mask is None:
        loss = error.mean(dim=(1, 2))
    else:
        loss = (error * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=LEAST_COUNT)
    return loss if weight is None else loss * weight
