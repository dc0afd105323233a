"""CLIP-L and T5: prompts to the embeddings that FLUX is conditioned on."""

import gc
import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fluxfast.encoders.components import component, from_pretrained, load_model, quiet
from fluxfast.errors import FluxfastError

log = logging.getLogger(__name__)


class TextEncoders:
    """Both text encoders, loaded from disk only.

    root: a diffusers folder with text_encoder/, tokenizer/, text_encoder_2/ and tokenizer_2/, or
    single files (`encoders/components.py`).
    Raises FluxfastError if one is missing, broken, or lacks weights.
    """

    def __init__(
        self, root: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ):
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast  # pyright: ignore

        self.device = torch.device(device)
        root = Path(root)
        # without attn_implementation config.json may name a repository whose compiled attention is
        # fetched and run
        options = {"dtype": dtype, "attn_implementation": None}
        with quiet("transformers"):
            self._clip_tokenizer = _load_tokenizer(
                CLIPTokenizer, cast(Path, component(root, "tokenizer")), "vocab.json"
            )
            self._t5_tokenizer = _load_tokenizer(
                T5TokenizerFast, cast(Path, component(root, "tokenizer_2")), "spiece.model"
            )
            clip, t5 = component(root, "text_encoder"), component(root, "text_encoder_2")
            self._clip: Any = load_model(CLIPTextModel, clip, dtype, options).to(self.device)
            self._t5: Any = load_model(T5EncoderModel, t5, dtype, options).to(self.device)
        self._announced: set[str] = set()

    @torch.no_grad()
    def encode(self, prompts: list[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Returns (t5 [B, max_length, D], pooled [B, P]), in the encoders' dtype, on their device.

        As diffusers' FluxPipeline does it: CLIP padded and cut to its 77 tokens, its pooled output;
        T5 padded and cut to `max_length`, its last hidden state, no attention mask (padding is
        attended to, in training as in sampling). The first cut prompt of each encoder is announced.
        Raises FluxfastError if the result is not finite (a danger of fp16).
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
        """Free both encoders, on the GPU too."""
        self._clip = self._t5 = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _tokenize(self, tokenizer, prompts: list[str], length: int, name: str) -> Tensor:
        with quiet("transformers"):
            ids = tokenizer(
                prompts,
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            if name not in self._announced:
                for prompt, tokens in zip(prompts, tokenizer(prompts).input_ids, strict=True):
                    if len(tokens) > length:
                        self._announced.add(name)
                        log.warning(
                            "%s reads %d tokens and cuts longer prompts; the first, of %d: %r",
                            name,
                            length,
                            len(tokens),
                            prompt if len(prompt) <= 60 else prompt[:60] + "…",
                        )
                        break
        return ids


def _load_tokenizer(cls, folder: Path, vocabulary: str):
    tokenizer = from_pretrained(cls, folder)
    # transformers makes an empty tokenizer of a folder without vocabulary, and says nothing
    if not (folder / "tokenizer.json").is_file() and not (folder / vocabulary).is_file():
        raise FluxfastError(
            f"{folder} holds neither tokenizer.json nor {vocabulary}",
            hint="download the folder again",
        )
    return tokenizer
