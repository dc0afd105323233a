"""Translates an ai-toolkit training YAML into fluxfast's configuration.

What means the same is mapped; every key that is ignored or read differently gets one note that says
why. A key that the file leaves out takes ai-toolkit's default, not fluxfast's. Imports neither
torch nor the configuration.
"""

import math
import os
import re
from typing import Any

from fluxfast.config.ai_toolkit_keys import OPTIMIZERS, PRECISIONS, SCHEDULES, TABLE, TIMESTEPS
from fluxfast.config.key_table import (
    Translation,
    flag,
    mapping,
    mappings,
    number,
    one_of,
    text,
    texts,
    whole,
)
from fluxfast.errors import ConfigError
from fluxfast.util.redact import names_secret


def is_ai_toolkit(raw: dict) -> bool:
    """Returns whether a parsed file has ai-toolkit's outer form (`job:`, `config: process:`)."""
    config = raw.get("config")
    return "job" in raw or (isinstance(config, dict) and "process" in config)


def convert_ai_toolkit(raw: dict) -> tuple[dict, list[str]]:
    """Returns the mapping that `build_config` takes, and notes on keys not read as they are.

    Raises ConfigError, naming every mistake at once: a form that is not one LoRA training of
    FLUX.1, a value of the wrong type, a setting that would train something else if it were ignored.
    """
    name, process, notes = _open_form(raw)
    datasets = process.pop("datasets", None)
    job = Translation(_flatten(process), notes, {})
    job.put("name", name)
    job.apply(TABLE)
    for settle in (_network, _model, _optimizer, _schedule, _timesteps, _ema, _previews):
        settle(job)
    _datasets(job, datasets)
    _accumulation(job)
    if job.mistakes:
        raise ConfigError(
            "; ".join(f"{location} {mistake}" for location, mistake in job.mistakes.items()),
            hint="change it in the file, or start from a configuration in examples/",
        )
    return job.native, [f"{location}: {note}" for location, note in job.notes.items()]


# ---------------------------------------------------------------- the file's form


def _open_form(raw: dict) -> tuple[str, dict, dict[str, str]]:
    """Returns the name, the one process, and notes on what stands around it. `[name]` and
    `${VARIABLE}` are replaced everywhere, as ai-toolkit does.
    """
    if raw.get("job", "extension") not in ("extension", "train"):
        raise ConfigError(f"job: {raw['job']!r} is not supported: only `extension` trains a LoRA")
    config = raw.get("config")
    if not isinstance(config, dict):
        raise ConfigError("config is missing: a `job:` file needs `config:` with name and process")
    name, processes = config.get("name"), config.get("process")
    if not isinstance(name, str) or not 0 < len(name) <= 150:  # it replaces every [name]
        raise ConfigError(
            f"config.name takes the run's name as text of 1 to 150 characters, got {name!r:.80}"
        )
    if not isinstance(processes, list) or len(processes) != 1:
        count = len(processes) if isinstance(processes, list) else repr(processes)
        raise ConfigError(
            f"config.process takes a list of one process, got {count}",
            hint="one file for each training",
        )
    process = _replace(processes[0], name)
    if not isinstance(process, dict):
        raise ConfigError(f"config.process[0] takes a mapping of settings, got {process!r}")
    kinds = ("sd_trainer", "diffusion_trainer", "ui_trainer")
    if process.get("type") not in kinds:
        raise ConfigError(
            f"config.process[0].type {process.get('type')!r} is not supported, only "
            f"{', '.join(kinds)}"
        )
    outside = {f"config.{key}" for key in config.keys() - {"name", "process"}}
    outside |= {str(key) for key in raw.keys() - {"job", "config", "meta"}}
    notes = dict.fromkeys(sorted(outside), "unknown, ignored")
    if raw.get("meta"):
        notes["meta"] = "ignored, the LoRA file's header holds name, trigger and all settings"
    return name, process, notes


def _replace(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _replace(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, name) for item in value]
    if not isinstance(value, str):
        return value
    for variable in re.findall(r"\$\{([^}]+)\}", value):
        if names_secret(variable):
            raise ConfigError(
                f"${{{variable}}} may hold a secret, and settings are saved with the run's LoRA",
                hint="take it out: an access token is found in the variable HF_TOKEN without it",
            )
        if variable not in os.environ:
            raise ConfigError(f"the environment variable {variable} is not set: {value!r}")
        value = value.replace(f"${{{variable}}}", os.environ[variable])
    return value.replace("[name]", name)


def _flatten(node: dict, section: str = "", location: str = "") -> dict[str, tuple[str, Any]]:
    """Returns dotted key -> (where it is written, value), down to the keys of the table. A key
    without a value is left out.
    """
    flat = {}
    for name, value in node.items():
        key, where = f"{section}{name}", f"{location}{name}"
        is_section = any(known.startswith(f"{key}.") for known in TABLE.known)
        if value is None:
            continue
        if is_section and isinstance(value, dict):
            flat |= _flatten(value, f"{key}.", f"{where}.")
        elif is_section and key not in TABLE.known:
            raise ConfigError(f"{where} takes a mapping of settings, got {value!r}")
        else:
            flat[key] = where, value
    return flat


# ---------------------------------------------------------------- keys that belong together


def _network(job: Translation) -> None:
    if not any(key.startswith("network") for key in job.written):
        job.refuse("network", "is missing: fluxfast trains a LoRA, not the whole model")
    # locon adds convolutions, of which FLUX has none
    job.get("network.type", one_of({"lora": "lora", "locon": "lora"}))
    linear = job.get("network.linear", whole, 4)
    rank = job.get("network.rank", whole, linear)
    key = "network.linear_alpha" if "network.linear_alpha" in job.written else "network.alpha"
    alpha = job.get(key, number, rank)
    job.put("lora.targets", "all")
    job.put("lora.rank", rank)
    job.put("lora.alpha", alpha)
    if alpha != rank:
        job.note(
            key,
            f"read as written, the LoRA acts at {alpha:g} / {rank} of its strength; ai-toolkit "
            f"ignores it for FLUX and takes {rank} (--set lora.alpha={rank} does so too)",
        )
    for ignored, used in (("alpha", "linear_alpha"), ("linear", "rank")):
        if {f"network.{ignored}", f"network.{used}"} <= job.written.keys():
            job.note(f"network.{ignored}", f"ignored, network.{used} is given")


def _model(job: Translation) -> None:
    arch = job.get("model.arch", text, "flux")
    if arch.split(":")[0] != "flux":
        job.refuse("model.arch", f"{arch!r} is not FLUX.1, the one family that fluxfast trains")
    compute = job.get("train.dtype", one_of(PRECISIONS), "fp32")
    if compute == "fp16":
        compute = "bf16"
        job.note("train.dtype", "read as bf16, FLUX's activations overflow 16-bit floats")
    job.put("model.compute", compute)
    job.put("model.storage", "auto" if job.get("model.quantize", flag) else compute)


def _optimizer(job: Translation) -> None:
    asked = job.get("train.optimizer", text, "adamw").lower()
    name, args, difference = job.get("train.optimizer", one_of(OPTIMIZERS), OPTIMIZERS["adamw"])
    params = job.get("train.optimizer_params", mapping, {})
    lr = job.get("train.lr", number, 1e-6)
    if name == "prodigy" and lr < 0.1:
        lr = 1.0
        if "train.lr" in job.written:
            job.note("train.lr", "read as 1, as ai-toolkit does below 0.1 with this optimizer")
    if difference:
        job.note("train.optimizer", difference)
    if asked.startswith("adam") and "w" not in asked and params.get("weight_decay"):
        job.note("train.optimizer_params", "weight_decay acts on the weights, as in AdamW")
    if name == "adafactor":
        job.put("train.max_grad_norm", None)
        if "train.max_grad_norm" in job.written:
            job.note("train.max_grad_norm", "ignored, as ai-toolkit does with adafactor")
    job.put("train.optimizer", name)
    job.put("train.optimizer_args", {**args, **params})
    job.put("train.lr", lr)


def _schedule(job: Translation) -> None:
    row = job.get("train.lr_scheduler", one_of(SCHEDULES), SCHEDULES["constant"])
    schedule, warmup, difference = row
    params = job.get("train.lr_scheduler_params", mapping, {})
    factors = ("start_factor", "end_factor") if row is SCHEDULES["linear"] else ()
    if difference and [params.get(name) for name in factors] != [1, 0]:
        job.note("train.lr_scheduler", difference)
    for name, value in params.items():
        key = f"train.lr_scheduler_params.{name}"
        if name == "num_warmup_steps":
            job.written[key] = key, value
            warmup = job.get(key, whole, 0)
        elif name not in factors:
            job.note(key, "ignored, the schedule spans the run after its warm-up")
    job.put("train.lr_schedule", schedule)
    job.put("train.warmup_steps", warmup)


def _timesteps(job: Translation) -> None:
    key = "train.timestep_type"
    asked = job.get(key, text, "sigmoid").lower()
    kind, difference = job.get(key, one_of(TIMESTEPS), TIMESTEPS["sigmoid"])
    bell = job.get("train.linear_timesteps", flag, False)
    half = job.get("train.linear_timesteps2", flag, False)
    if half and not bell:
        job.note("train.linear_timesteps2", "read as linear_timesteps: the bell on both sides")
    if bell or half:
        kind, difference = "linear", None
        if asked not in ("sigmoid", "linear", "weighted"):
            difference = "ignored, as ai-toolkit does where linear_timesteps is on"
    if difference:
        job.note(key, difference)
    job.put("train.timesteps", kind)


def _ema(job: Translation) -> None:
    decay = job.get("train.ema_config.ema_decay", number, 0.999)
    if job.get("train.ema_config.use_ema", flag):
        job.put("train.ema", {"enabled": True, "decay": decay})


def _previews(job: Translation) -> None:
    key, prompts = "sample.prompts", job.get("sample.prompts", texts, [])
    differences = []
    if "sample.samples" in job.written:
        if prompts:
            job.note(key, "ignored, sample.samples is given")
        key, samples = "sample.samples", job.get("sample.samples", mappings, [])
        prompts = [str(item.get("prompt", "")) for item in samples]
        if any(set(item) - {"prompt"} for item in samples):
            differences.append("only the prompts are read, size and seed are the section's")
    if any("--" in prompt for prompt in prompts):
        differences.append("what follows -- in a prompt is cut off")
        prompts = [prompt.partition("--")[0].strip() for prompt in prompts]
    if not job.get("trigger_word", text) and any("[trigger]" in prompt for prompt in prompts):
        differences.append("[trigger] is taken out, there is no trigger_word")
        prompts = [prompt.replace("[trigger]", "").strip() for prompt in prompts]
    if differences:
        job.note(key, "; ".join(differences))
    job.put("sample.prompts", [] if job.get("train.disable_sampling", flag) else prompts)
    job.put("sample.first", not job.get("train.skip_first_sample", flag))


# ---------------------------------------------------------------- data sets, and steps


def _datasets(job: Translation, entries: Any) -> None:
    """Puts `data` and `trigger`; each entry is translated like a small file of its own."""
    try:
        entries = mappings(entries)
    except ValueError as error:
        job.refuse("datasets", f"{error}, got {entries!r}")
        return
    triggers = {str(entry["trigger_word"]) for entry in entries if entry.get("trigger_word")}
    own = job.get("trigger_word", text)
    trigger = own or (triggers.pop() if len(triggers) == 1 else None)
    if trigger:
        job.put("trigger", trigger)
        job.note(
            "trigger_word" if own else "datasets.trigger_word",
            "put in front with a comma where a caption lacks it; ai-toolkit has a space",
        )
    data = []
    for index, entry in enumerate(entries):
        written = _flatten(entry, "datasets.", f"datasets[{index}].")
        part = Translation(written, job.notes, job.mistakes)
        reg = next((k for k in ("is_reg", "prior_reg") if part.get(f"datasets.{k}", flag)), None)
        if reg:
            reason = "this folder is left out, there is no training on regularization pictures"
            part.note(f"datasets.{reg}", reason)
            continue
        part.apply(TABLE)
        _dataset(part, trigger, f"datasets[{index}].folder_path")
        data.append(part.native["data"])
    if not data and not job.mistakes:
        job.refuse("datasets", "holds no folder to train on")
    job.native["data"] = data


def _dataset(part: Translation, trigger: str | None, folder_key: str) -> None:
    data = part.native["data"]
    if "folder" not in data:
        part.mistakes.setdefault(folder_key, "is missing")
    if data["caption_ext"].lstrip(".") in ("json", "jsonl"):
        reason = "json is not supported: write the captions to .txt files"
        part.refuse("datasets.caption_ext", reason)
    if part.written.get("datasets.trigger_word", ("", ""))[1] not in ("", trigger):
        part.note("datasets.trigger_word", "ignored, one trigger serves all data sets")
    if data["shuffle_captions"] and trigger:
        data["keep_tokens"] += 1
    if data["flip"]:
        data["num_repeats"] *= 2
    alpha, folder = part.get("datasets.alpha_mask", flag), part.get("datasets.mask_path", text)
    if alpha and folder:
        part.note("datasets.mask_path", "ignored, alpha_mask is on")
    if alpha:
        data["mask"] = "alpha"
    elif folder:
        data["mask"], data["mask_folder"] = "folder", folder


def _accumulation(job: Translation) -> None:
    """`gradient_accumulation_steps` counts every batch as a step in ai-toolkit,
    `gradient_accumulation` does not.
    """
    key = "train.gradient_accumulation_steps"
    legacy = job.get(key, whole, 1)
    batches = job.get("train.gradient_accumulation", whole, 1)
    if legacy < 1:
        job.refuse(key, f"{legacy} is not supported, give a number of batches")
    elif legacy > 1 and batches > 1:
        job.refuse(key, "and train.gradient_accumulation exclude each other")
    elif legacy > 1:
        total = job.native["train"]["steps"]
        for native in ("train.steps", "train.warmup_steps", "save.every", "sample.every"):
            section, name = native.split(".")
            job.native[section][name] = math.ceil(job.native[section][name] / legacy)
        job.note(
            key,
            f"read as {legacy} batches added up for each step: {total} batches make "
            f"{job.native['train']['steps']} steps, save_every, sample_every and warm-up likewise; "
            "ai-toolkit discards all gradients but the last batch's",
        )
    job.put("train.gradient_accumulation", max(legacy, batches))
