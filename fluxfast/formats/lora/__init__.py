"""LoRA files of every trainer, in and out."""

from fluxfast.formats.lora.apply import load_lora, save_lora

__all__ = ["load_lora", "save_lora"]
