"""Faults of shared memory that use from several threads or modes revealed."""

import threading
from functools import partial

import pytest
import torch

from fluxfast import rng
from fluxfast.data.loader import Loader
from fluxfast.data.prepare import prepare
from fluxfast.model.lora import fresh_update
from fluxfast.model.lora_linear import LoRALinear


def nf4_layer(width: int, seed: int) -> LoRALinear:
    torch.manual_seed(seed)
    layer = LoRALinear(width, width)
    layer.set_weight(torch.randn(width, width) / width**0.5, "nf4")
    return layer


def in_threads(*functions) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_training_after_a_preview_in_inference_mode():
    """The decoding scratch was made there, and could not be written to outside."""
    trained = []

    def work():  # a thread of its own starts without a scratch
        layer = nf4_layer(64, 0)
        layer.add_update(fresh_update(layer, 4, 4.0, [[(0, 64)]]))
        with torch.inference_mode():
            layer(torch.randn(2, 64))
        layer(torch.randn(2, 64, requires_grad=True)).sum().backward()
        trained.append(layer.lora_B.grad is not None)

    in_threads(work)
    assert trained == [True]


def test_two_threads_may_use_nf4_layers_at_once():
    """They decoded into the same memory: nine results in ten were wrong."""
    x = torch.randn(8, 1024)
    layers = [nf4_layer(1024, seed) for seed in range(2)]
    wrong = []

    def work(layer, expected):
        for _ in range(40):
            with torch.no_grad():
                if not torch.equal(layer(x), expected):
                    wrong.append(layer)

    in_threads(*(partial(work, layer, layer(x)) for layer in layers))
    assert not wrong


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_copy_waits_for_the_gpu(configure):
    dataset = prepare(configure(), torch.device("cpu")).dataset
    (batch,) = Loader(dataset, 2, 0, pin=True).iterate(0, 1)
    assert batch.t5.is_pinned() and batch.mean.is_pinned()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rng.normal(0, "noise", batch.indices, (4,), "cuda")
        batch.t5.to("cuda", non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
