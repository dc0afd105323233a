"""The whole transformer through the launchers: the same velocity and gradients as by reference."""

import pytest
import torch
from fluxfast_kernels import backend
from numerics import relative_error
from small import SMALL

from fluxfast.model.flux import Flux, random_flux
from fluxfast.model.lora import inject_lora
from fluxfast.objective import image_ids, text_ids


def small_flux(storage: str, compute: str, device: str, targets: str) -> Flux:
    model = random_flux(SMALL, storage, compute, device, seed=3)
    parameters = inject_lora(model, 4, targets=targets)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters[1::2]:  # B, zero until now
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.to(device).train()


def step(model: Flux, device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """-> velocity, and the gradient of every LoRA parameter."""
    g = torch.Generator().manual_seed(5)
    y = model(
        torch.randn(2, 6, SMALL.in_channels, generator=g).to(device),
        image_ids(4, 6).to(device),
        torch.randn(2, 5, SMALL.context_in_dim, generator=g).to(device),
        text_ids(5).to(device),
        torch.tensor([0.25, 0.75], device=device),
        torch.randn(2, SMALL.vec_in_dim, generator=g).to(device),
        torch.ones(2, device=device),
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    return y.detach(), list(torch.autograd.grad(y.float().square().mean(), parameters))


@pytest.mark.parametrize("targets", ["attn+mlp", "all"])
@pytest.mark.parametrize(
    ("storage", "compute", "tolerance"),
    # fp32: sums in another order, a thousand in a row; bf16: thirty roundings a block
    [("fp32", "fp32", 2e-5), ("nf4", "fp32", 2e-5), ("nf4", "bf16", 3e-2)],
)
def test_launchers_and_references_agree(device, storage, compute, tolerance, targets):
    model = small_flux(storage, compute, device, targets)
    launched = step(model, device)
    with backend.cpu_launches(False):
        reference = step(model.cpu() if device == "cuda" else model, "cpu")
    assert relative_error(launched[0].cpu(), reference[0]) < tolerance
    for found, expected in zip(launched[1], reference[1], strict=True):
        assert relative_error(found.cpu(), expected) < tolerance
