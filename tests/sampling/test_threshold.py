"""Dynamic thresholding against its definition on unpacked latents, in every combination."""

import itertools
import math
from typing import get_args

import pytest
import torch

from fluxfast.config.schema import THRESHOLD_PRESET, ScaleMode, ThresholdConfig
from fluxfast.objective import pack, unpack
from fluxfast.sampling.threshold import FACTORS, share_done, threshold


def factor(mode: str, f: float, v: float) -> float:
    """The original's scale of a mode, restated."""
    cos = math.cos
    wave = (f * v) % 1
    return {
        "constant": 1,
        "linear_down": 1 - f,
        "cosine_down": cos(1.5707 * f),
        "half_cosine_down": cos(f),
        "linear_up": f,
        "cosine_up": 1 - cos(1.5707 * f),
        "half_cosine_up": 1 - cos(f),
        "power_up": math.pow(f, v),
        "power_down": 1 - math.pow(f, v),
        "linear_repeating": (0.5 - wave) * 2 if wave < 0.5 else (wave - 0.5) * 2,
        "cosine_repeating": cos(f * v * 6.28318) * 0.5 + 0.5,
        "sawtooth": wave,
    }[mode]


def plain(cond, uncond, cfg, s: ThresholdConfig, f: float):
    """As the original does, on [B, C, h, w], a sample at a time."""
    cfg = (cfg - s.cfg_scale_min) * factor(s.cfg_mode, f, s.sched_val) + s.cfg_scale_min
    mimic = s.mimic_scale - s.mimic_scale_min
    mimic = mimic * factor(s.mimic_mode, f, s.sched_val) + s.mimic_scale_min
    results = []
    for c, u in zip(cond, uncond, strict=True):
        d = c - u
        low, full = (u + d * mimic).flatten(1), (u + d * cfg).flatten(1)
        low_c, mean = low - low.mean(1, keepdim=True), full.mean(1, keepdim=True)
        full_c = full - mean
        every = s.separate_feature_channels
        if s.variability_measure == "AD":
            m = low_c.abs().max(1)[0] if every else low_c.abs().max()
            if every:
                q = torch.quantile(full_c.abs(), s.threshold_percentile, dim=1)
            else:
                q = torch.quantile(full_c.abs().flatten(), s.threshold_percentile)
        else:
            m = low_c.std(1) if every else low_c.std()
            q = full_c.std(1) if every else full_c.std()
        m, q = m.reshape(-1, 1), q.reshape(-1, 1)
        if s.scaling_startpoint == "ZERO":
            result = full / (q / m)
        elif s.variability_measure == "AD":
            most = torch.maximum(m, q)
            result = torch.minimum(torch.maximum(full_c, -most), most) / most * m + mean
        else:
            result = full_c / q * m + mean
        result = result * s.interpolate_phi + full * (1 - s.interpolate_phi)
        results.append(result.view_as(c))
    return torch.stack(results)


@pytest.fixture(scope="module")
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 16, 6, 8, generator=generator).unbind()


@pytest.mark.parametrize("mode", FACTORS)
def test_every_combination_is_the_original(pair, mode):
    cond, uncond = pair
    kinds = itertools.product(("MEAN", "ZERO"), ("AD", "STD"), (True, False), (0.3, 2.5))
    for start, measure, separate, sched_val in kinds:
        settings = ThresholdConfig(
            mimic_scale=3.0,
            threshold_percentile=0.95,
            mimic_mode=mode,
            mimic_scale_min=1.0,
            cfg_mode=mode,
            cfg_scale_min=2.0,
            sched_val=sched_val,
            separate_feature_channels=separate,
            scaling_startpoint=start,
            variability_measure=measure,
            interpolate_phi=0.7,
            schedule="steps",
        )
        for step in (0, 3, 9):
            f = share_done("steps", 0.5, step, 10)
            expected = plain(cond, uncond, 8.0, settings, f)
            got = threshold(pack(cond), pack(uncond), 8.0, settings, f)
            error = (unpack(got, 6, 8) - expected).norm() / expected.norm()
            assert error < 1e-6, (settings, step, error)


def test_the_settings_have_every_mode():
    assert set(get_args(ScaleMode)) == set(FACTORS)


def test_the_schedules():
    assert [share_done("steps", 0.9, i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert share_done("steps", 1.0, 0, 1) == 0 and share_done("constant", 0.5, 3, 5) is None
    for t in (1.0, 0.5, 0.01):  # ComfyUI's node on FLUX: every mode at its end
        f = share_done("comfyui", t, 0, 20)
        assert 1 <= f < 1.002
        assert FACTORS["half_cosine_up"](f, 1.0) == pytest.approx(0.4597, abs=1e-3)


def test_what_has_no_range_is_left_as_it_is(pair):
    flat = torch.zeros(1, 12, 64)
    for start, measure in itertools.product(("MEAN", "ZERO"), ("AD", "STD")):
        settings = ThresholdConfig(scaling_startpoint=start, variability_measure=measure)
        assert torch.equal(threshold(flat + 1, flat + 1, 8.0, settings, None), flat + 1)


def test_the_preset_is_what_workflows_hold(pair):
    cond, uncond = (pack(x) for x in pair)
    preset = ThresholdConfig.model_validate(THRESHOLD_PRESET)
    f = share_done("comfyui", 0.7, 4, 20)
    scaled = ThresholdConfig(mimic_scale=7 * 0.46, interpolate_phi=0.7)
    by_hand = threshold(cond, uncond, 8 * 0.46, scaled, None)
    assert torch.allclose(threshold(cond, uncond, 8.0, preset, f), by_hand, rtol=5e-3, atol=5e-3)
    # as the node: plain guidance where the two scales are one
    assert torch.equal(threshold(cond, uncond, 7.0, preset, f), uncond + 7.0 * (cond - uncond))
    with pytest.raises(ValueError, match="need schedule"):
        ThresholdConfig(cfg_mode="linear_up")
