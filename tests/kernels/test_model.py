"""The whole transformer through the launchers: the same velocity and gradients as by reference."""

import pytest
import torch
from fluxfast_kernels.dispatch import backend
from numerics import relative_error
from small import SMALL, random_flux

from fluxfast.model.flux import Flux
from fluxfast.model.lora import inject_lora
from fluxfast.objective import image_ids, text_ids


def small_flux(storage: str, compute: str, device: str, targets: str, **how) -> Flux:
    model = random_flux(SMALL, storage, compute, device, seed=3, **how)
    parameters = inject_lora(model, 4, targets=targets)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters[1::2]:  # B, zero until now
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.to(device).train()


def step(model: Flux, device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The velocity, and the gradient of every LoRA parameter."""
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


@pytest.mark.slow
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
    for gradient, expected in zip(launched[1], reference[1], strict=True):
        assert relative_error(gradient.cpu(), expected) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "layers"), [("int8", None), ("nf4", {"single_blocks.*.linear2": "rotate"})]
)
def test_int8_matmuls_launched_and_in_plain_torch_agree(device, storage, layers):
    """Equal inputs give equal 8-bit values; later layers' inputs are equal but for fp32's rounding.

    That is 2e-5 as above, unless a value lies so near to a tie that it is rounded to the other
    side: 1e5 values, each within 127 · 1e-7 of one with a chance of 1e-5: about one a step. One
    unit of an 8-bit value is 1/127 of its token's largest, so at most about 1 % of that token's
    share in a gradient that sums over 22 tokens, and a weight's norm less in the velocity: 5e-3 at
    the most (seen: 1.7e-3), a fifth of the 2.5e-2 that int8 matmuls themselves change.
    """
    how = {"activations": "fp32", "layers": layers}
    model = small_flux(storage, "int8", device, "attn+mlp", **how)
    launched = step(model, device)
    with backend.cpu_launches(False):
        reference = step(model.cpu() if device == "cuda" else model, "cpu")
        for module in model.modules():
            if getattr(module, "matmul", ""):
                assert module.rotation == (64 if layers and module.in_features == 320 else 0)
                module.matmul, module.rotation = "", 0
        exact = step(model, "cpu") if layers is None else None
    errors = [relative_error(launched[0].cpu(), reference[0])]
    for gradient, expected in zip(launched[1], reference[1], strict=True):
        errors.append(relative_error(gradient.cpu(), expected))
    assert max(errors) < 5e-3, errors
    if exact is not None:  # the matmuls were in 8 bits: what that changes is far above
        changed = [relative_error(a, b) for a, b in zip(reference[1], exact[1], strict=True)]
        assert 1e-2 < max(changed) < 5e-2, changed
