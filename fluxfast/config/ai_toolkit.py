"""Translates an ai-toolkit training YAML into fluxfast's configuration.

The rules are in `ai_toolkit_keys.py`, here is what takes several keys. A key that the file leaves
out takes ai-toolkit's default, not fluxfast's. Imports neither torch nor the configuration.
"""

import math
import os
import re
from typing import Any

from fluxfast.config.ai_toolkit_keys import (
    ARCHITECTURES,
    FLAGS,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    TABLE,
    TIMESTEPS,
)
from fluxfast.config.key_table import (
    OFF,
    Translation,
    flag,
    mapping,
    mappings,
    note_lines,
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
    job = Translation(_flatten(process) | {"datasets": ("datasets", datasets)}, notes, {})
    job.put("name", name)
    job.apply(TABLE)
    for settle in (_network, _model, _optimizer, _schedule, _timesteps, _ema):
        settle(job)
    _datasets(job)
    _previews(job)
    _accumulation(job)
    if job.mistakes:
        raise ConfigError(
            "; ".join(f"{location} {mistake}" for location, mistake in job.mistakes.items()),
            hint="change it in the file, or start from a configuration in examples/",
        )
    return job.native, note_lines(job.notes)


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
    meta = raw.get("meta")
    if meta and not (isinstance(meta, dict) and meta.keys() <= {"name", "version"}):
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
    job.put("lora.alpha", rank)
    if alpha != rank:
        job.note(
            key,
            "of no effect, ai-toolkit trains FLUX with alpha = rank: the LoRA acts at full "
            f"strength (--set lora.alpha={alpha:g} takes {alpha:g} / {rank} of it)",
        )
    if {"network.linear", "network.rank"} <= job.written.keys() and linear != rank:
        job.note("network.linear", "ignored, network.rank is given")


def _model(job: Translation) -> None:
    arch = job.get("model.arch", text, "flux")
    if arch.split(":")[0] not in ARCHITECTURES:
        reason = f"{arch!r} is not text-to-image FLUX.1 (flux, flex1), which is all that is trained"
        job.refuse("model.arch", reason)
    compute = job.get("train.dtype", one_of(PRECISIONS), "fp32")
    if compute == "fp16":
        compute = "bf16"
        job.note("train.dtype", "read as bf16, FLUX's activations overflow 16-bit floats")
    job.put("model.compute", compute)
    quantized = job.get("model.quantize", flag)
    job.put("model.storage", "auto" if quantized else compute)
    for name in ("qtype", "quantize_kwargs", "accuracy_recovery_adapter"):
        value = job.written.get(f"model.{name}", ("", None))[1]
        if quantized and value not in (*OFF, "qfloat8", "float8"):
            job.note(f"model.{name}", "ignored, the base is kept as model.quantize's note says")
    if any(
        [job.get(key, flag) for key in ("train.bypass_guidance_embedding", "model.use_flux_cfg")]
    ):
        job.put("train.guidance", None)


def _optimizer_of(word: Any) -> tuple[str, dict, str | None]:
    if isinstance(word, str):  # ai-toolkit reads no further: prodigyopt
        word = re.sub("^(prodigy8bit|prodigy).*", r"\1", word.lower())
    return one_of(OPTIMIZERS)(word)


def _optimizer(job: Translation) -> None:
    asked = job.get("train.optimizer", text, "adamw").lower()
    name, args, difference = job.get("train.optimizer", _optimizer_of, OPTIMIZERS["adamw"])
    params = job.get("train.optimizer_params", mapping, {})
    lr = job.get("train.lr", number, 1e-6)
    if name == "prodigy" and lr < 0.1:
        lr = 1.0
        if "train.lr" in job.written:
            job.note("train.lr", "read as 1, as ai-toolkit does below 0.1 with this optimizer")
    if difference:
        job.note("train.optimizer", difference)
    if asked.startswith("adam") and "w" not in asked and params.get("weight_decay"):
        job.refuse(
            "train.optimizer_params",
            f"has weight_decay, which {asked} adds to the gradient: set it to 0, or take "
            f"{name}, where it acts on the weights",
        )
    if name == "adafactor":
        job.put("train.max_grad_norm", None)
        if "train.max_grad_norm" in job.written:
            job.note("train.max_grad_norm", "ignored, as ai-toolkit does with adafactor")
    job.put("train.optimizer", name)
    job.put("train.optimizer_args", {**args, **params})
    job.put("train.lr", lr)


def _schedule(job: Translation) -> None:
    key, params = "train.lr_scheduler", "train.lr_scheduler_params."
    schedule, warmup = job.get(key, one_of(SCHEDULES), SCHEDULES["constant"])
    warmup = job.get(f"{params}warmup_steps", whole, warmup)
    lr = job.native["train"]["lr"]
    end = job.get(f"{params}eta_min", number, 0.0) if schedule == "cosine" else 0.0
    if schedule == "constant":
        job.put("train.lr", lr * job.get(f"{params}factor", number, 1))
    elif schedule == "linear":
        end = lr * job.get(f"{params}end_factor", number, 1)
        if job.get(f"{params}start_factor", number) != 1:
            job.refuse(
                key,
                "rises in ai-toolkit, from a third of lr unless start_factor says otherwise, which "
                "is not supported: for a fall to 0 set lr_scheduler_params: {start_factor: 1, "
                "end_factor: 0}",
            )
    if end:
        job.put("train.lr_end", end)
    job.put("train.lr_schedule", schedule)
    job.put("train.warmup_steps", job.get(f"{params}num_warmup_steps", whole, warmup))


def _timesteps(job: Translation) -> None:
    key = "train.timestep_type"
    kind = job.get(key, one_of(TIMESTEPS), "sigmoid")
    bell = job.get("train.linear_timesteps", flag, False)
    half = job.get("train.linear_timesteps2", flag, False)
    if (bell or half) and kind != "weighted":
        if kind == "flux_shift":
            job.note(key, "ignored, as ai-toolkit does where linear_timesteps is on")
        kind = "linear2" if half else "linear"
    job.put("train.timesteps", kind)


def _ema(job: Translation) -> None:
    section = "train.ema_config."
    decay = job.get(f"{section}ema_decay", number, 0.999)
    if not job.get(f"{section}use_ema", flag):
        return
    job.put("train.ema", {"enabled": True, "decay": decay})
    for name, default in (("use_feedback", False), ("param_multiplier", 1)):
        if job.written.get(f"{section}{name}", ("", default))[1] != default:
            job.refuse(f"{section}{name}", "moves the weights by their average: take it out")


def _previews(job: Translation) -> None:
    key, prompts = "sample.prompts", job.get("sample.prompts", texts, [])
    items = [{"prompt": prompt} for prompt in prompts]
    if "sample.samples" in job.written:
        if prompts:
            job.note(key, "ignored, sample.samples is given")
        key, items = "sample.samples", job.get("sample.samples", mappings, [])
    previews, differences = [], {}
    for index, item in enumerate([] if job.get("train.disable_sampling", flag) else items):
        where = f"{key}[{index}]"
        part = Translation(_flatten(item, "sample.samples.", f"{where}."), job.notes, job.mistakes)
        prompt, *options = part.get("sample.samples.prompt", text, "").split("--")
        for word, _, value in (option.strip().partition(" ") for option in options):
            if word in FLAGS:
                part.written[f"sample.samples.{FLAGS[word]}"] = f"{where}: --{word}", value
            else:
                differences[f"--{word} is cut off"] = None
        part.apply(TABLE)
        if "[trigger]" in prompt and "trigger" not in job.native:
            differences["[trigger] is taken out, there is no trigger_word"] = None
            prompt = prompt.replace("[trigger]", "")
        samples = part.native["sample"].get("samples", {})
        if job.get("model.use_flux_cfg", flag):  # one number is both
            own = {"cfg": samples.get("guidance"), "negative": part.get("sample.samples.neg", text)}
            samples |= {key: value for key, value in own.items() if value is not None}
        previews.append(samples | {"prompt": prompt.strip()})
    if differences:
        job.note(key, "; ".join(differences))
    if any(len(preview) > 1 for preview in previews):
        job.put("sample.samples", previews)
    else:
        job.put("sample.prompts", [preview["prompt"] for preview in previews])
    if job.get("model.use_flux_cfg", flag):
        job.put("sample.cfg", job.get("sample.guidance_scale", number, 7.0))
        job.put("sample.negative", job.get("sample.neg", text, ""))
    if file := job.get("model.inference_lora_path", text):
        job.put("sample.loras", [{"file": file}])
    job.put("sample.first", not job.get("train.skip_first_sample", flag))


# ---------------------------------------------------------------- data sets, and steps


def _datasets(job: Translation) -> None:
    """Puts `data` and `trigger`; each entry is translated like a small file of its own."""
    entries = job.get("datasets", mappings, [])
    trigger = job.get("trigger_word", text)
    own = [entry.get("trigger_word") for entry in entries]
    if not trigger and own and own == own[:1] * len(own):
        trigger = own[0]  # one that all have is the run's own
    cached = job.get("train.cache_text_embeddings", flag)
    parts = []
    for index, entry in enumerate(entries):
        written = _flatten(entry, "datasets.", f"datasets[{index}].")
        part = Translation(written, job.notes, job.mistakes)
        part.apply(TABLE)
        _dataset(part, trigger, cached)
        if "folder" not in part.native["data"]:
            job.mistakes.setdefault(f"datasets[{index}].folder_path", "is missing")
        parts.append(part.native["data"])
    if not parts and not job.mistakes:
        job.refuse("datasets", "holds no folder to train on")
    if trigger:
        job.put("trigger", trigger)
    if trigger or any("trigger" in data for data in parts):
        text_ = "put in front with a comma where a caption lacks it, ai-toolkit has a space"
        if trigger and any(data["caption_dropout"] for data in parts):
            text_ += "; a dropped caption is the empty prompt, in ai-toolkit the trigger alone"
        key = "trigger_word" if "trigger_word" in job.written else "datasets.trigger_word"
        job.note(key, text_)
    if job.get("train.inverted_mask_prior", flag) and any("mask" in data for data in parts):
        reason = "needs a second prediction in each step, which is not made: take it out"
        job.refuse("train.inverted_mask_prior", reason)
    cached = cached or all(entry.get("cache_text_embeddings") for entry in entries)
    if job.get("train.unload_text_encoder", flag) and not cached:
        job.refuse(
            "train.unload_text_encoder",
            "makes ai-toolkit train on the trigger or the empty prompt alone: take it out to train "
            "on the captions (the encoders are freed before the first step either way)",
        )
    job.native["data"] = parts


def _dataset(part: Translation, trigger: str | None, cached: bool | None) -> None:
    data = part.native["data"]
    if (part.get("datasets.cache_text_embeddings", flag) or cached) and data["caption_dropout"]:
        data["caption_dropout"] = 0.0
        reason = "off, as in ai-toolkit where text embeddings are cached"
        part.note("datasets.caption_dropout_rate", reason)
    own = part.get("datasets.trigger_word", text)
    if own and own != trigger:
        data["trigger"] = own
    if data["shuffle_captions"]:
        if data["keep_tokens"]:  # theirs keeps tokens from their dropout
            part.note("datasets.keep_tokens", "of no effect on the shuffle, as in ai-toolkit")
        data["keep_tokens"] = bool(trigger) + ("trigger" in data)
    if data["flip"]:
        data["num_repeats"] *= 2
    alpha, folder = part.get("datasets.alpha_mask", flag), part.get("datasets.mask_path", text)
    if alpha and folder:
        part.note("datasets.mask_path", "ignored, alpha_mask is on")
    if alpha:
        data["mask"] = "alpha"
    elif folder:
        data["mask"], data["mask_folder"] = "folder", folder
    if "mask" in data and part.get("datasets.invert_mask", flag):
        part.refuse("datasets.invert_mask", "is not supported: save the masks inverted")


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
