"""Dynamic thresholding: a high scale of classifier-free guidance with the range of a low one.

    d = c − u;  X = u + cfg · d;  M = u + mimic · d      of x0 predicted with and without the prompt
    Xc = X − mean X;  m = max |M − mean M|;  q = quantile |Xc|;  S = max(m, q)
    result = phi · (clamp(Xc, −S, S) / S · m + mean X) + (1 − phi) · X

by channel, over all its places (AD and MEAN; `ThresholdConfig` has the variants, under the names
that they have in the original). The original takes latents [B, C, h, w]; a packed token holds (C,
2, 2), so a view reaches the same places. What it lacks: guards against a range of zero and against
one step, and one number per sample where channels are not separate.
Source: github.com/mcmonkeyprojects/sd-dynamic-thresholding, dynthres_core.py.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fluxfast.config.schema import ThresholdConfig

# mode -> factor of a scale at f, the share of the steps done, v being sched_val
FACTORS: dict[str, Callable[[float, float], float]] = {
    "constant": lambda f, v: 1.0,
    "linear_down": lambda f, v: 1.0 - f,
    "cosine_down": lambda f, v: math.cos(1.5707 * f),
    "half_cosine_down": lambda f, v: math.cos(f),
    "linear_up": lambda f, v: f,
    "cosine_up": lambda f, v: 1.0 - math.cos(1.5707 * f),
    "half_cosine_up": lambda f, v: 1.0 - math.cos(f),
    "power_up": lambda f, v: f**v,
    "power_down": lambda f, v: 1.0 - f**v,
    "linear_repeating": lambda f, v: abs(2.0 * (f * v % 1.0) - 1.0),
    "cosine_repeating": lambda f, v: 0.5 * math.cos(6.28318 * f * v) + 0.5,
    "sawtooth": lambda f, v: f * v % 1.0,
}


def share_done(schedule: str, t: float, step: int, steps: int) -> float | None:
    """Returns f of step 0 … steps - 1 at time t; None where nothing is scheduled.

    comfyui: ComfyUI's node counts 999 - 1000·t of SD's timesteps; FLUX's are t itself, so that f is
    1 and a little more at every step: half_cosine_up is a constant factor of 0.46.
    """
    if schedule == "steps":
        return step / max(1, steps - 1)
    return (999.0 - t) / 998.0 if schedule == "comfyui" else None


def threshold(
    cond: Tensor, uncond: Tensor, cfg: float, settings: ThresholdConfig, f: float | None
) -> Tensor:
    """Returns x0 [B, T, 4·C] of the predictions with and without the prompt, packed, fp32."""
    s, mimic, phi = settings, settings.mimic_scale, settings.interpolate_phi
    if s.schedule == "comfyui" and cfg == mimic:  # as the node does, before its schedule
        return uncond + cfg * (cond - uncond)
    if f is not None:
        cfg = s.cfg_scale_min + (cfg - s.cfg_scale_min) * FACTORS[s.cfg_mode](f, s.sched_val)
        factor = FACTORS[s.mimic_mode](f, s.sched_val)
        mimic = s.mimic_scale_min + (mimic - s.mimic_scale_min) * factor
    c, u = (x.unflatten(-1, (-1, 4)).transpose(1, 2).flatten(2) for x in (cond, uncond))
    full, low = u + cfg * (c - u), u + mimic * (c - u)  # [B, C, 4·T]
    mean = full.mean(-1, keepdim=True)
    centered, low = full - mean, low - low.mean(-1, keepdim=True)
    if s.separate_feature_channels:
        samples, lows = centered, low
    else:
        samples, lows = centered.flatten(1)[:, None], low.flatten(1)[:, None]
    if s.variability_measure == "AD":
        m = lows.abs().amax(-1, keepdim=True)
        q = torch.quantile(samples.abs(), s.threshold_percentile, -1, keepdim=True)
    else:
        m, q = lows.std(-1, keepdim=True), samples.std(-1, keepdim=True)
    if s.scaling_startpoint == "ZERO":
        result = full * _ratio(m, q)
    elif s.variability_measure == "STD":
        result = centered * _ratio(m, q) + mean
    else:
        most = torch.maximum(m, q)
        result = centered.clamp(-most, most) * _ratio(m, most) + mean
    result = phi * result + (1.0 - phi) * full
    return result.unflatten(2, (-1, 4)).transpose(1, 2).flatten(2)


def _ratio(m: Tensor, q: Tensor) -> Tensor:
    """Returns m / q, 1 where q is 0: what varies nowhere is left as it is."""
    return torch.where(q > 0, m / q, 1.0)
