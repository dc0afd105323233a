"""Writes the built parts as one folder in diffusers' layout, in half precision."""

import json
from pathlib import Path

WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


def write_folder(folder: Path, tokenizers: tuple, parts: dict, judge) -> Path:
    """`parts` holds the four networks under FluxPipeline's names. Each is stored in fp16: nano
    weights are small, and fp16 keeps three bits more of them than bf16."""
    import torch
    from diffusers import FluxPipeline
    from judge import FILE
    from make_nano import make_scheduler
    from safetensors.torch import load_file, save_file

    pipeline = FluxPipeline(
        scheduler=make_scheduler(), tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], **parts
    )
    pipeline.save_pretrained(folder)
    # save_pretrained writes tokenizer.json alone; the published FLUX folders have these too
    tokenizers[0].backend_tokenizer.model.save(str(folder / "tokenizer"))
    for path in sorted(folder.rglob("*.safetensors")):
        half = {name: tensor.to(torch.float16) for name, tensor in load_file(path).items()}
        assert all(tensor.isfinite().all() for tensor in half.values()), path
        save_file(half, path, metadata={"format": "pt"})
    for name in WEIGHTS[2:]:  # transformers would compute in the weights' dtype otherwise
        path = folder / name / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.half() for name, tensor in judge.state_dict().items()}, folder / FILE)
    return folder
