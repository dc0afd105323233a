"""An ai-toolkit training YAML becomes fluxfast's configuration.

What means the same is mapped; every key that is ignored or read differently becomes one note that
says why. A key that the file leaves out takes ai-toolkit's default, not fluxfast's. Imports neither
torch nor the configuration.
"""

import copy
import math
import os
import re
from collections.abc import Callable
from typing import Any

from fluxfast.config.ai_toolkit_keys import (
    COUNTED_IN_STEPS,
    IGNORED_KEYS,
    MAPPED,
    OFF,
    OPTIMIZERS,
    QUIET,
    REFUSED,
    SCHEDULES,
    TIMESTEPS,
    TOGETHER,
    flag,
    flatten,
    mapping,
    mappings,
    nearest,
    number,
    precision,
    text,
    whole,
    words,
)
from fluxfast.errors import ConfigError
from fluxfast.util.redact import names_secret


def is_ai_toolkit(raw: dict) -> bool:
    """Whether a parsed file has ai-toolkit's outer form (`job:`, `config: process:`)."""
    config = raw.get("config")
    return "job" in raw or (isinstance(config, dict) and "process" in config)


def convert_ai_toolkit(raw: dict) -> tuple[dict, list[str]]:
    """-> (the mapping that `build_config` takes, one note per key ignored or read differently).

    Raises ConfigError, naming every mistake at once: a form that is not one LoRA training of
    FLUX.1, a value of the wrong type, a setting that would train something else if it were ignored.
    """
    name, process, outside = open_form(raw)
    job = _Job(flatten(process))
    job.native = {"name": name, "data": [], **_defaults()}
    for key, reason in outside:
        job.note(key, reason)
    for key in list(job.given):
        _look_up(job, key)
    for settle in (_network, _precision, _optimizer, _schedule, _timesteps, _ema, _previews):
        settle(job)
    _datasets(job, process.get("datasets"))
    _accumulation(job)
    if job.wrong:
        raise ConfigError(
            "; ".join(job.wrong),
            hint=job.hint or "change it in the file, or start from a configuration in examples/",
        )
    return job.native, job.notes


class _Job:
    """One file on its way: the keys given (flat), what they become, what is to be said."""

    def __init__(self, given: dict[str, Any], place: str = ""):
        self.given, self.place = given, place
        self.native: dict = {}
        self.notes: list[str] = []
        self.wrong: list[str] = []
        self.hint: str | None = None

    def note(self, key: str, text: str) -> None:
        self.notes.append(f"{self.place}{key}: {text}")

    def refuse(self, key: str, text: str, hint: str | None = None) -> None:
        self.wrong.append(f"{self.place}{key} {text}")
        self.hint = self.hint or hint

    def get(self, key: str, read: Callable, default: Any = None) -> Any:
        """The value of a key through its reader; the default where it is absent or wrong."""
        if key not in self.given:
            return default
        try:
            return read(self.given[key])
        except ValueError as error:
            self.refuse(key, f"{error}, got {self.given[key]!r}")
            return default

    def put(self, key: str, value: Any) -> None:
        node = self.native
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value


def _look_up(job: _Job, key: str, prefix: str = "") -> None:
    """Map, announce or refuse one key; those of TOGETHER wait for their function."""
    value, known = job.given[key], prefix + key
    if known in MAPPED:
        native, read, _ = MAPPED[known]
        value = job.get(key, read)
        if value is not None:
            job.put(native, value)
    elif known in IGNORED_KEYS:
        if value not in QUIET.get(known, OFF):
            job.note(key, IGNORED_KEYS[known])
    elif known in REFUSED:
        if value not in OFF:
            job.refuse(key, REFUSED[known])
    elif known not in TOGETHER:
        job.note(key, f"unknown, ignored{nearest(known)}")


# ---------------------------------------------------------------- keys that belong together


def _network(job: _Job) -> None:
    if not any(key.startswith("network") for key in job.given):
        job.refuse("network", "is missing: fluxfast trains a LoRA, not the whole model")
    kind = job.get("network.type", text, "lora").lower()
    if kind not in ("lora", "locon"):  # locon adds convolutions, of which FLUX has none
        job.refuse("network.type", f"{kind!r} is not supported, only lora", "network: type: lora")
    linear = job.get("network.linear", whole, 4)
    rank = job.get("network.rank", whole, linear)
    key = "network.linear_alpha" if "network.linear_alpha" in job.given else "network.alpha"
    alpha = job.get(key, number)
    job.put("lora.rank", rank)
    job.put("lora.alpha", rank if alpha is None else alpha)
    if alpha is not None and alpha != rank:
        job.note(
            key,
            f"read as written, the LoRA acts at {alpha:g} / {rank} of its strength; ai-toolkit "
            f"ignores it for FLUX and takes {rank} (--set lora.alpha={rank} does so too)",
        )
    if key == "network.linear_alpha" and "network.alpha" in job.given:
        job.note("network.alpha", "ignored, network.linear_alpha is given")
    if "network.rank" in job.given and "network.linear" in job.given:
        job.note("network.linear", "ignored, network.rank is given")
    job.put("lora.targets", "all")
    if not job.get("network.transformer_only", flag, True):
        job.note("network.transformer_only", "ignored, the blocks' linears alone are trained")
    if not job.get("train.train_unet", flag, True):
        job.refuse("train.train_unet", "is false: there is nothing else to train")


def _precision(job: _Job) -> None:
    arch = job.get("model.arch", text, "flux")
    if arch.split(":")[0] != "flux" or not job.get("model.is_flux", flag, True):
        job.refuse("model", "is not FLUX.1, the one family that fluxfast trains", "arch: flux")
    compute = job.get("train.dtype", precision, "fp32")
    if compute == "fp16":
        job.note("train.dtype", "read as bf16, FLUX's activations overflow 16-bit floats")
    job.put("model.compute", compute if compute == "fp32" else "bf16")
    if not job.get("model.quantize", flag, False):
        job.put("model.storage", job.native["model"]["compute"])
        return
    job.put("model.storage", "auto")
    job.note(
        "model.quantize",
        "read as storage auto: 4-bit NF4 on a GPU where ai-toolkit keeps 8-bit floats, fp32 on a "
        "CPU (--set model.storage=fp8 keeps 8-bit floats too, bf16 the base unrounded)",
    )


def _optimizer(job: _Job) -> None:
    """Their epsilon is 1e-6 for the Adam family; `adam` is AdamW whose decay is 0 by default."""
    asked = job.get("train.optimizer", text, "adamw").lower()
    name, args, difference = OPTIMIZERS.get(asked, (None, {}, None))
    if name is None:
        job.refuse(
            "train.optimizer",
            f"{asked!r} has no equivalent here",
            f"optimizers read: {', '.join(OPTIMIZERS)}",
        )
        return
    params = job.get("train.optimizer_params", mapping, {})
    lr = job.get("train.lr", number, 1e-6)
    if name == "prodigy" and lr < 0.1:
        lr = 1.0
        if "train.lr" in job.given:
            job.note("train.lr", "read as 1, as ai-toolkit does below 0.1 with this optimizer")
    if difference:
        job.note("train.optimizer", difference)
    if asked.startswith("adam") and "w" not in asked and params.get("weight_decay"):
        job.note("train.optimizer_params", "weight_decay acts on the weights, as in AdamW")
    if name == "adafactor":
        job.put("train.max_grad_norm", None)
        if "train.max_grad_norm" in job.given:
            job.note("train.max_grad_norm", "ignored, as ai-toolkit does with adafactor")
    job.put("train.optimizer", name)
    job.put("train.optimizer_args", {**args, **params})
    job.put("train.lr", lr)


def _schedule(job: _Job) -> None:
    asked = job.get("train.lr_scheduler", text, "constant").lower()
    params = job.get("train.lr_scheduler_params", mapping, {})
    if asked not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        job.refuse("train.lr_scheduler", f"{asked!r} has no equivalent here", f"read: {known}")
        return
    job.put("train.lr_schedule", SCHEDULES[asked])
    rises = asked == "linear" and (params.get("start_factor"), params.get("end_factor")) != (1, 0)
    if rises:
        job.note(
            "train.lr_scheduler",
            "read as a fall from lr to 0; ai-toolkit's would rise from a third of lr to lr unless "
            "start_factor is 1 and end_factor 0",
        )
    elif asked == "polynomial":
        job.note("train.lr_scheduler", "read as linear, from lr to 0")
    warmup = 1000 if asked == "constant_with_warmup" else 0
    for key, value in params.items():
        place = f"train.lr_scheduler_params.{key}"
        if key == "num_warmup_steps":
            job.given[place] = value
            warmup = job.get(place, whole, 0)
        elif not (asked == "linear" and key in ("start_factor", "end_factor")):
            job.note(place, "ignored, the schedule spans the run after its warm-up")
    job.put("train.warmup_steps", warmup)


def _timesteps(job: _Job) -> None:
    asked = job.get("train.timestep_type", text, "sigmoid").lower()
    bell = job.get("train.linear_timesteps", flag, False)
    half = job.get("train.linear_timesteps2", flag, False)
    kind, difference = TIMESTEPS.get(asked, (None, None))
    if kind is None:
        job.refuse(
            "train.timestep_type",
            f"{asked!r} has no equivalent here",
            f"timestep types read: {', '.join(TIMESTEPS)}",
        )
        return
    if half and not bell:
        job.note("train.linear_timesteps2", "read as linear_timesteps: the bell on both sides")
    if bell or half:
        kind = "linear"
        if asked not in ("sigmoid", "linear", "weighted"):
            difference = "ignored, as ai-toolkit does where linear_timesteps is on"
    if difference and not ((bell or half) and asked == "weighted"):
        job.note("train.timestep_type", difference)
    job.put("train.timesteps", kind)


def _ema(job: _Job) -> None:
    enabled = job.get("train.ema_config.use_ema", flag, False)
    decay = job.get("train.ema_config.ema_decay", number, 0.999)
    if not enabled:
        return
    job.put("train.ema", {"enabled": True, "decay": decay})
    job.note(
        "train.ema_config.use_ema",
        "the average is saved as NAME_ema.safetensors; NAME.safetensors and previews hold the "
        "weights as trained, and a resumed run goes on from those (ai-toolkit keeps the average "
        "alone and resumes from it)",
    )


def _previews(job: _Job) -> None:
    key, prompts = "sample.prompts", job.get("sample.prompts", words, [])
    differences = []
    if "sample.samples" in job.given:
        if prompts:
            job.note(key, "ignored, sample.samples is given")
        key, prompts = "sample.samples", []
        for item in job.get(key, mappings, []):
            prompts.append(str(item.get("prompt", "")))
            if set(item) - {"prompt"}:
                differences = ["only the prompts are read, size and seed are the section's"]
    if any("--" in prompt for prompt in prompts):
        differences.append("what follows -- in a prompt is cut off")
        prompts = [prompt.partition("--")[0].strip() for prompt in prompts]
    if not job.given.get("trigger_word") and any("[trigger]" in prompt for prompt in prompts):
        differences.append("[trigger] is taken out, there is no trigger_word")
        prompts = [prompt.replace("[trigger]", "").strip() for prompt in prompts]
    if differences:
        job.note(key, "; ".join(differences))
    job.put("sample.prompts", [] if job.get("train.disable_sampling", flag, False) else prompts)
    job.put("sample.first", not job.get("train.skip_first_sample", flag, False))


# ---------------------------------------------------------------- data sets, and steps


def _datasets(job: _Job, entries: Any) -> None:
    """Fills `data` and `trigger`; each entry is converted like a small file of its own."""
    try:
        entries = mappings(entries)
    except ValueError as error:
        job.refuse("datasets", f"{error}, got {entries!r}")
        return
    triggers = {str(entry["trigger_word"]) for entry in entries if entry.get("trigger_word")}
    trigger = job.get("trigger_word", text) or (triggers.pop() if len(triggers) == 1 else None)
    if trigger:
        job.put("trigger", trigger)
        key = "trigger_word" if job.given.get("trigger_word") else "datasets.trigger_word"
        job.note(key, "put in front with a comma where a caption lacks it; ai-toolkit has a space")
    for index, entry in enumerate(entries):
        part = _Job(flatten(entry, "datasets."), f"datasets[{index}].")
        part.native = _defaults("datasets.")
        for key in list(part.given):
            _look_up(part, key, "datasets.")
        kept = _dataset(part, trigger)
        job.notes += part.notes
        job.wrong += part.wrong
        if kept:
            job.native["data"].append(part.native)
    if not job.native["data"] and not job.wrong:
        job.refuse("datasets", "holds no folder to train on")


def _dataset(part: _Job, trigger: str | None) -> bool:
    """Settle one entry. -> whether it is trained on."""
    if part.get("is_reg", flag, False) or part.get("prior_reg", flag, False):
        key = "is_reg" if part.given.get("is_reg") else "prior_reg"
        part.notes = []  # whatever else it says does not matter
        part.note(key, "this folder is left out, there is no training on regularization pictures")
        return False
    data, given = part.native, part.given
    if "folder" not in data and not part.wrong:
        part.refuse("folder_path", "is missing")
    if data["caption_ext"].lstrip(".") in ("json", "jsonl"):
        part.refuse("caption_ext", "json is not supported: write the captions to .txt files")
    if given.get("trigger_word") and given["trigger_word"] != trigger:
        part.note("trigger_word", "ignored, one trigger serves all data sets")
    if data["shuffle_captions"]:
        data["keep_tokens"] += 1 if trigger else 0
        part.note(
            "shuffle_tokens",
            "a few orders are drawn once for each picture (data.shuffle_variants), not a new one "
            "each time" + ("; the trigger stays in front" if trigger else ""),
        )
    if data["flip"]:
        data["num_repeats"] *= 2
        part.note(
            "flip_x", "a picture comes twice, mirrored or not by chance, not once in each form"
        )
    alpha, folder = part.get("alpha_mask", flag, False), part.get("mask_path", text)
    if alpha and folder:
        part.note("mask_path", "ignored, alpha_mask is on")
    if alpha:
        data["mask"] = "alpha"
    elif folder:
        data["mask"], data["mask_folder"] = "folder", folder
    return True


def _accumulation(job: _Job) -> None:
    """Their `gradient_accumulation_steps` counts every batch as a step, `gradient_accumulation`
    does not.
    """
    legacy = job.get("train.gradient_accumulation_steps", whole, 1)
    batches = job.get("train.gradient_accumulation", whole, 1)
    key = "train.gradient_accumulation_steps"
    if legacy < 1:
        job.refuse(key, f"{legacy} is not supported, give a number of batches")
    elif legacy > 1 and batches > 1:
        job.refuse(key, "and train.gradient_accumulation exclude each other")
    elif legacy > 1 and not job.wrong:
        total = job.native["train"]["steps"]
        for section, name in COUNTED_IN_STEPS:
            job.native[section][name] = math.ceil(job.native[section][name] / legacy)
        job.note(
            key,
            f"read as {legacy} batches added up for each step: {total} batches make "
            f"{job.native['train']['steps']} steps, save_every, sample_every and warm-up likewise; "
            "ai-toolkit discards all gradients but the last batch's",
        )
    job.put("train.gradient_accumulation", max(legacy, batches))


def _defaults(prefix: str = "") -> dict:
    """ai-toolkit's defaults under native keys, of one data set or of everything else."""
    job = _Job({})
    for key, (native, _, default) in MAPPED.items():
        if default is not None and key.startswith("datasets.") == bool(prefix):
            job.put(native, copy.deepcopy(default))
    return job.native


def open_form(raw: dict) -> tuple[str, dict, list[tuple[str, str]]]:
    """-> (name, the one process, notes on what stands around it). `[name]` and `${VARIABLE}` are
    replaced everywhere, as ai-toolkit does.
    """
    if raw.get("job", "extension") not in ("extension", "train"):
        raise ConfigError(f"job: {raw['job']!r} is not supported: only `extension` trains a LoRA")
    config = raw.get("config")
    if not isinstance(config, dict):
        raise ConfigError("config is missing: a `job:` file needs `config:` with name and process")
    name, processes = config.get("name"), config.get("process")
    # it is put in wherever [name] stands
    if not isinstance(name, str) or not 0 < len(name) <= 150:
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
    outside = [(f"config.{key}", "unknown, ignored") for key in config.keys() - {"name", "process"}]
    outside += [(str(key), "unknown, ignored") for key in raw.keys() - {"job", "config", "meta"}]
    if raw.get("meta"):
        reason = "ignored, the LoRA file's header holds name, trigger and the whole configuration"
        outside.append(("meta", reason))
    return name, process, sorted(outside)


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
