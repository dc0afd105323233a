"""What is wrong with a configuration, in words: where, what, and what was meant perhaps."""

import difflib
from typing import Any

from pydantic import BaseModel

_SHOWN = 80  # characters of a key or a value
_MOST = 20  # mistakes


def describe(errors: list[dict], config: type[BaseModel]) -> str:
    """pydantic's errors in one line. config: the whole configuration's class, whose keys are
    known.
    """
    more = f"; and {len(errors) - _MOST} more" if len(errors) > _MOST else ""
    return "; ".join(_clause(item, config) for item in errors[:_MOST]) + more


def _clause(item: dict, config: type[BaseModel]) -> str:
    where = _cut(".".join(str(part) for part in item["loc"]) or "settings")
    if item["type"] == "extra_forbidden":
        return f"unknown key {where!r}" + _nearest(item["loc"], config)
    if item["type"] == "missing":
        return f"{where} is missing"
    if item["type"] == "model_type":
        return f"{where} takes a mapping of settings (got {_shown(item['input'])})"
    message = item["msg"].removeprefix("Value error, ")
    got = item.get("input")
    return f"{where}: {message[:1].lower()}{message[1:]}" + (
        "" if isinstance(got, dict | list) else f" (got {_shown(got)})"
    )


def _shown(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


# what other trainers call the same setting: spelling distance cannot find these
_SYNONYMS = {
    "learning_rate": "train.lr",
    "network": "lora",
    "linear": "lora.rank",
    "network_dim": "lora.rank",
    "network_alpha": "lora.alpha",
    "linear_alpha": "lora.alpha",
    "datasets": "data",
    "folder_path": "data.folder",
    "trigger_word": "trigger",
    "max_train_steps": "train.steps",
    "timestep_type": "train.timesteps",
    "shuffle_tokens": "data.shuffle_captions",
    "save_every": "save.every",
    "name_or_path": "model.path",
    "assistant_lora_path": "model.assistant_lora",
    "pretrained_lora_path": "lora.init_from",
    "network_weights": "lora.init_from",
    "save_format": "save.formats",
    "gradient_checkpointing": "memory.policy",
    "low_vram": "memory.limit_gib",
}


def _nearest(location: tuple, config: type[BaseModel]) -> str:
    """`, did you mean 'x'?`: a known synonym, a key of that name in another section, the nearest
    of this section, then of all.
    """
    word = str(location[-1])
    if word in _SYNONYMS:
        return f", did you mean {_SYNONYMS[word]!r}?"
    keys = sorted(all_keys(config))
    leaves = {key.rpartition(".")[2]: key for key in keys}
    if word in leaves:
        return f", did you mean {leaves[word]!r}?"
    parent = ".".join(str(part) for part in location[:-1] if not isinstance(part, int))
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == parent}
    close = difflib.get_close_matches(word, siblings, n=1, cutoff=0.5)
    if close:
        return f", did you mean {siblings[close[0]]!r}?"
    words = _SYNONYMS | leaves
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if close:
        return f", did you mean {words[close[0]]!r}?"
    return f"; known here: {', '.join(sorted(siblings))}"


def all_keys(section: type[BaseModel], prefix: str = "") -> set[str]:
    keys = set()
    for name, field in section.model_fields.items():
        keys.add(prefix + name)
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                keys |= all_keys(part, f"{prefix}{name}.")
    return keys
