"""CLIP-L and T5: prompts to the embeddings that FLUX is conditioned on."""

import gc
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxfast.encoders.components import load_model, load_tokenizer
from fluxfast.encoders.placement import free_bytes, place
from fluxfast.errors import FluxfastError

log = logging.getLogger(__name__)

# bytes for what T5 makes of 512 tokens (64 heads' scores in fp32 are 64 MiB) and cuBLAS: assumed
_WORK = 2**29


class TextEncoders:
    """Both text encoders, loaded from disk only. Of T5 blocks that do not fit into the free memory
    stay on the host, with a note.

    root: see `encoders/components.py`. Raises FluxfastError if a component is missing, broken, or
    lacks weights, or too little memory is free.
    """

    def __init__(
        self, root: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ):
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast  # pyright: ignore

        self.device = torch.device(device)
        self._clip_tokenizer = load_tokenizer(CLIPTokenizer, root, "tokenizer", "vocab.json")
        self._t5_tokenizer = load_tokenizer(T5TokenizerFast, root, "tokenizer_2", "spiece.model")
        self._clip: Any = load_model(CLIPTextModel, root, "text_encoder", dtype).to(self.device)
        self._t5: Any = load_model(T5EncoderModel, root, "text_encoder_2", dtype)
        free, blocks = free_bytes(self.device), self._t5.encoder.block
        if on_host := place(self._t5, blocks, self.device, free, _WORK):
            log.warning(
                f"note: T5 does not fit into the {free / 2**30:.1f} GiB that are free: {on_host} "
                f"of its {len(blocks)} blocks are copied to the GPU for each caption, which is "
                "slower and gives the same embeddings"
            )
        self._announced: set[str] = set()

    @torch.no_grad()
    def encode(self, prompts: list[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Returns (t5 [B, max_length, D], pooled [B, P]), in the encoders' dtype, on their device.

        Follows diffusers' FluxPipeline: CLIP's pooled output of 77 tokens, T5's last hidden state
        of `max_length` tokens, both padded and cut, without an attention mask (padding is attended
        to). Logs the first prompt that is cut. Raises FluxfastError if the result is not finite (a
        danger of fp16).
        """
        clip_ids = self._tokenize(
            self._clip_tokenizer, prompts, self._clip_tokenizer.model_max_length, "CLIP"
        )
        t5_ids = self._tokenize(self._t5_tokenizer, prompts, max_length, "T5")
        pooled = self._clip(clip_ids.to(self.device), output_hidden_states=False).pooler_output
        t5 = self._t5(t5_ids.to(self.device), output_hidden_states=False)[0]
        if not (torch.isfinite(t5).all() and torch.isfinite(pooled).all()):
            raise FluxfastError(
                f"the text encoders gave values that are not finite in {self._t5.dtype}",
                hint="run them in bfloat16 or float32",
            )
        return t5.to(self._t5.dtype), pooled.to(self._clip.dtype)

    def close(self) -> None:
        """Frees both encoders' memory, on the GPU too."""
        self._clip = self._t5 = None
        gc.collect()
        torch.cuda.empty_cache()

    def _tokenize(self, tokenizer, prompts: list[str], length: int, name: str) -> Tensor:
        if name not in self._announced:
            uncut = tokenizer(prompts, verbose=False).input_ids
            for prompt, tokens in zip(prompts, uncut, strict=True):
                if len(tokens) > length:
                    self._announced.add(name)
                    start = prompt if len(prompt) <= 60 else prompt[:60] + "…"
                    log.warning(
                        f"{name} reads {length} tokens and cuts longer prompts; the first, of "
                        f"{len(tokens)}: {start!r}"
                    )
                    break
        options = {"padding": "max_length", "max_length": length, "truncation": True}
        return tokenizer(prompts, **options, return_tensors="pt").input_ids
