"""Follows the flow from noise, or from the middle of it, to latents.

Takes prompt embeddings, not prompts, so that training draws previews without a text encoder.
Sources: BFL `flux/sampling.py`, get_schedule and denoise; diffusers' FluxImg2ImgPipeline,
FluxInpaintPipeline and FluxPipeline (true_cfg_scale), FlowMatchHeunDiscreteScheduler.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast import rng
from fluxfast.memory.cuda_graphs import Graphs, is_out_of_memory, why_not
from fluxfast.model.flux import Flux
from fluxfast.objective import flux_shift, image_ids, pack, text_ids, unpack
from fluxfast.sampling.picture import Picture
from fluxfast.sampling.threshold import share_done, threshold

Embedding = tuple[Tensor, Tensor]  # t5 [1, L, D], pooled [1, P]
StepProgress = Callable[[int, int, float], None]  # steps done, of all, seconds of the last


class Pass(NamedTuple):
    """What a pass of the model reads. modulation [n, columns]."""

    img: Tensor
    img_ids: Tensor
    txt: Tensor
    txt_ids: Tensor
    timesteps: Tensor
    y: Tensor
    modulation: Tensor


def pass_graphs(model: Flux, device: torch.device) -> Graphs:
    """Returns what replays passes of one size at a time as a CUDA graph: at 512 px a pass's
    launches take about as long as its kernels.
    """

    def run(inputs: Pass) -> Tensor:
        return model(*inputs[:-1], modulation=inputs.modulation)

    reason = why_not(device, offload=False, wanted=True)
    return Graphs(run, torch.empty(0, device=device), reason)


def schedule(steps: int, tokens: int, sigmas: str = "flux", shifted: bool = True) -> list[float]:
    """Returns steps + 1 values of t from 1 (noise) to 0.

    shifted: FLUX.1-dev's resolution-dependent shift towards noise, by the number of image tokens;
    simple: by 4096, 1024 px. beta: quantiles of Beta(0.6, 0.6) between the first of these and the
    last above 0 (arXiv 2407.12173).
    """
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if shifted:
        t[1:-1] = flux_shift(t[1:-1], 4096 if sigmas == "simple" else tokens)
    if sigmas == "beta":
        from scipy.stats import beta

        quantiles = beta.ppf(torch.linspace(1, 0, steps, dtype=t.dtype).numpy(), 0.6, 0.6)
        t[:-1] = t[-2] + torch.from_numpy(quantiles) * (t[0] - t[-2])
    return t.tolist()


def first_step(steps: int, strength: float) -> int:
    """Returns the step at which image to image begins, by diffusers' rule: 0 at strength 1."""
    return int(max(steps - min(steps * strength, steps), 0))


def noise_for(
    seed: int, channels: int, height: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns the starting noise of a seed, fp32 [1, C, h, w], h, w in latent rows and columns."""
    return rng.normal(seed, "sample", 0, (channels, height, width), device)


@torch.no_grad()
def sample_latents(
    model: Flux,
    noise: Tensor,
    picture: Picture,
    embeddings: list[Embedding],
    latents: Tensor | None = None,
    mask: Tensor | None = None,
    progress: StepProgress | None = None,
    graphs: Graphs | None = None,
) -> Tensor:
    """Returns latents like noise, fp32 [1, C, h, w].

    embeddings: of the prompt, and of the negative one where `cfg` acts. latents: of the picture to
    start from, like noise. mask: [1, 1, h, w], 1 where it is painted anew and 0 where latents stay.
    guidance goes to dev's embedding; schnell has none and no shift. The model's LoRA acts at its
    own strength; its mode is left as it was. graphs: `pass_graphs` of the model.
    """
    height, width = noise.shape[2:]
    options, x = picture.options, pack(noise)
    shifted = model.spec.guidance_embed
    times = schedule(picture.steps, x.shape[1], options.sigmas, shifted)
    start, keep = x, torch.zeros_like(x)
    if latents is not None:
        keep = pack(latents)
        times = times[first_step(picture.steps, options.strength) :]
        x = times[0] * start + (1 - times[0]) * keep
    anew = None if mask is None else pack(mask.expand_as(noise))
    training = model.training
    model.eval()
    try:
        velocity = Velocity(model, (height, width), times, picture, embeddings, graphs)
        for step, (now, following) in enumerate(zip(times, times[1:], strict=False)):
            begun = time.perf_counter()
            v = velocity(x, step, step)
            if options.sampler == "heun" and following > 0:
                v = (v + velocity(x + (following - now) * v, step + 1, step)) / 2
            x = x + (following - now) * v
            if anew is not None:
                x = anew * x + (1 - anew) * (following * start + (1 - following) * keep)
            if progress:
                if x.is_cuda:  # sync: else the launches alone are timed
                    torch.cuda.synchronize(x.device)
                progress(step + 1, len(times) - 1, time.perf_counter() - begun)
    finally:
        model.train(training)
    return unpack(x, height, width)


class Velocity:
    """The model's velocity along a schedule, by classifier-free guidance where that acts.

    Modulation depends on time and pooled text alone, so that of all steps is computed at once.
    """

    def __init__(
        self,
        model: Flux,
        size: tuple[int, int],
        times: list[float],
        picture: Picture,
        embeddings: list[Embedding],
        graphs: Graphs | None = None,
    ):
        self.times, self.options = times, picture.options
        device = embeddings[0][0].device
        self.graphs = graphs or pass_graphs(model, torch.device("cpu"))
        self.ids = image_ids(*size, device), text_ids(embeddings[0][0].shape[1], device)
        t = torch.tensor(times[:-1], device=device)
        guidance = torch.full_like(t, picture.guidance)
        self.conditions = [
            (t5, pooled, model.modulation(t, pooled.expand(len(t), -1), guidance))
            for t5, pooled in embeddings
        ]
        self._one_batch = True

    def __call__(self, x: Tensor, index: int, step: int) -> Tensor:
        """Returns the velocity at x [1, T, 64] and time `index`, fp32, in step `step`."""
        options, steps = self.options, len(self.times) - 1
        cfg, inside = options.cfg, options.cfg_start <= step / steps < options.cfg_end
        if cfg is None or cfg == 1 or not inside:
            return self._pass(x, index, 0)
        cond, uncond = self._both(x, index)
        if options.threshold is None:
            return uncond + cfg * (cond - uncond)
        t = self.times[index]
        f = share_done(options.threshold.schedule, t, step, steps)
        x0 = threshold(x - t * cond, x - t * uncond, cfg, options.threshold, f)
        return (x - x0) / t

    def _both(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """In one batch; one after the other once memory did not suffice for it."""
        try:
            if self._one_batch:
                cond, uncond = self._pass(x, index, 0, 1).chunk(2)
                return cond, uncond
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._one_batch = False
        if x.is_cuda:  # once the error has let go of its tensors
            torch.cuda.empty_cache()
        return self._pass(x, index, 0), self._pass(x, index, 1)

    def _pass(self, x: Tensor, index: int, *which: int) -> Tensor:
        t5, pooled, modulation = zip(*(self.conditions[each] for each in which), strict=True)
        rows = torch.cat([each[index : index + 1] for each in modulation])
        t = torch.full((len(which),), self.times[index], device=x.device)
        image, text = self.ids
        img = x.expand(len(which), -1, -1)
        inputs = Pass(img, image, torch.cat(t5), text, t, torch.cat(pooled), rows)
        key = len(which), x.shape[1], t5[0].shape[1]
        if self.graphs.reason is None and not self.graphs.has(key):
            try:
                self.graphs.capture({key: inputs})
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.graphs.run_eagerly("memory is too small for them")
        return self.graphs(key, inputs).float()
