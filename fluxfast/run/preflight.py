"""What is checked before a run does any work: everything that can be seen without a model, then
without weights, then without an encoding.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

import torch

from fluxfast.config.schema import Config
from fluxfast.data.cache import Bucket
from fluxfast.data.prepare import Parts, preview_pictures, resolve_parts
from fluxfast.distributed import Ranks
from fluxfast.encoders.components import component
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.formats.base.load import broken_compiler
from fluxfast.formats.lora.apply import extract_lora, init_lora, load_assistant, sampling_loras
from fluxfast.formats.lora.write import to_state
from fluxfast.memory.planner.step_spec import shape_of
from fluxfast.model.init import hollow
from fluxfast.model.lora import inject_lora, lora_layers
from fluxfast.model.spec import FluxSpec
from fluxfast.objective import Batch
from fluxfast.optim import check_optimizer
from fluxfast.sampling.draw import check_picture
from fluxfast.tools.plan import plan_run
from fluxfast.util.files import check_space
from fluxfast.util.hub import fetch_lora


def check_start(config: Config, device: torch.device, fresh: bool) -> Parts:
    """Returns the model's parts. Raises FluxfastError for everything that can be seen before
    pictures are encoded: a run that is refused has done no work.
    """
    check_settings(config, device)
    parts = resolve_parts(config.model, device)
    check_encoders(parts.root, parts.model.spec)
    check_loras(config, parts.model.spec, fresh)
    return parts


def check_settings(config: Config, device: torch.device) -> None:
    """Raise FluxfastError for what no run can begin with and needs no model to be seen: before one
    is fetched.
    """
    if fault := broken_compiler(device):
        raise FluxfastError(f"nothing can be trained on this GPU: {fault[0]}", hint=fault[1])
    check_optimizer(config.train, device)
    for picture in preview_pictures(config):
        check_picture(picture)
    folders = [("validation.folder", config.validation.folder)]
    for data in config.data:
        folders += [("data.folder", data.folder), ("data.mask_folder", data.mask_folder)]
    for key, folder in folders:
        try:
            if folder is not None:
                os.scandir(folder).close()
        except OSError as error:
            message = f"cannot read the folder {folder}: {error.strerror}"
            raise FluxfastError(message, hint=f"check `{key}`") from None
    memory = config.memory
    on_host = "host" in (memory.modulation, memory.optimizer_state) or memory.policy == "offload"
    if on_host and device.type != "cuda" and memory.limit_gib is None:
        raise ConfigError(
            "memory: moving things to the host takes a plan, and on a CPU there is none",
            hint="set memory.limit_gib to try one",
        )


def check_loras(config: Config, spec: FluxSpec, fresh: bool) -> None:
    """Raise FluxfastError for a LoRA that cannot be trained, started from its file, assisted or
    saved as configured, before pictures are encoded: the LoRA is put on a model without weights.

    fresh: the run starts at step 0, and so reads `lora.init_from`.
    """
    model = hollow(spec)
    parameters = inject_lora(model, **config.lora.model_dump(exclude={"init_from"}), seed=None)
    if config.lora.init_from and fresh:
        init_lora(model, config.lora.init_from)
    if "xlabs" in config.save.formats:  # the one format that cannot hold every target
        nothing = dict.fromkeys(lora_layers(model), (torch.zeros(0, 0), torch.zeros(0, 0)))
        hint = "lora.targets: attn, or save.formats without xlabs"
        to_state(extract_lora(model, nothing), "xlabs", hint=hint)
    if config.model.assistant_lora:
        load_assistant(model, fetch_lora(config.model.assistant_lora))
    for each in config.sample.all_drawn():
        with sampling_loras(model, each.loras):
            pass
    modulation = config.memory.modulation
    if modulation in ("ahead", "host") and any(x.trains() for x in model.modulation_linears()):
        raise ConfigError(
            f"memory.modulation: {modulation} needs frozen modulation, and lora.targets: all "
            "trains it",
            hint="memory.modulation: auto, or lora.targets: attn+mlp",
        )
    if config.run_dir.is_dir():  # on a machine of ranks that write nothing it need not be
        copies = (1 + config.train.ema.enabled) * sum(p.numel() for p in parameters)
        # the weights and their files; of what an optimizer adds nothing is counted
        check_space(config.run_dir, copies * (4 + 2 * len(config.save.formats)))


def check_encoders(root: Path, spec: FluxSpec) -> None:
    """Raise FluxfastError where the encoders' settings, if they are files, name other widths than
    the transformer's.
    """
    keys = (
        ("text_encoder_2", "d_model"),
        ("text_encoder", "hidden_size"),
        ("vae", "latent_channels"),
    )
    widths = []
    for name, key in keys:
        source, width = component(root, name), None
        if isinstance(source, Path):
            with suppress(OSError, ValueError, AttributeError):  # loading reports it
                config = json.loads((source / "config.json").read_text(encoding="utf-8"))
                width = config.get(key)
        widths.append(width)
    _check_widths(tuple(widths), spec)


def check_memory(
    config: Config, parts: Parts, device: torch.device, ranks: Ranks, buckets: set[Bucket]
) -> None:
    """Raise ConfigError where no plan for these buckets fits into the device's memory."""
    length = parts.text_length
    shapes = {
        f"{count} of {width}x{height}": shape_of(width, height, len(ranks.shard(count)), length)
        for (width, height), count in sorted(buckets)
    }
    plan_run(config, parts.model, shapes, device)


def check_fits(batch: Batch, spec: FluxSpec) -> None:
    """Raise FluxfastError where cached encodings are not of the transformer's widths."""
    _check_widths((batch.t5.shape[-1], batch.pooled.shape[-1], batch.mean.shape[1]), spec)


def _check_widths(widths: tuple[int | None, ...], spec: FluxSpec) -> None:
    expected = spec.context_in_dim, spec.vec_in_dim, spec.in_channels // 4
    names = "T5 states", "pooled CLIP states", "latents"
    for name, width, needed in zip(names, widths, expected, strict=True):
        if width not in (needed, None):
            raise FluxfastError(
                f"the encoders do not belong to this transformer: {name} are {width} wide, it "
                f"takes {needed}",
                hint="model.encoders must name the pipeline folder that the transformer came with",
            )
