"""Which settings may change between a run and its continuation.

Every key is in one of three classes. `model.layers` and `train.optimizer_args` are compared whole,
paths by where they lead, and where that differs by the content there.
"""

import os
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Any

from fluxfast.config.schema import OLD_POLICIES, Config
from fluxfast.data.prepare import Parts
from fluxfast.encoders.components import component_fingerprint
from fluxfast.encoders.fingerprint import fingerprint
from fluxfast.errors import ConfigError
from fluxfast.formats.base.folder import transformer_folder
from fluxfast.util.files import expanded
from fluxfast.util.hub import ENCODERS, fetch_lora

# refused: another value would make the saved state meaningless, or the run a mixture of two
# applied: how far, how fast, where and in what arithmetic the run goes on, and what it reports
# start: read only when a run begins
# train.warmup_steps is refused as schedule-free and prodigy keep it in their state; validation.* as
# one series must be measured alike, and held-out pictures must not be trained on
_TABLE = """
refused  -           name seed trigger
applied  -           output_dir cache_dir device log_every
refused  model       path encoders assistant_lora max_sequence_length
applied  model       storage double_quant compute layers
refused  lora        rank alpha dropout targets include exclude share_a
start    lora        init_from
refused  data        folder recursive resolution num_repeats caption_ext default_caption
refused  data        caption_prefix caption_suffix shuffle_captions keep_tokens shuffle_variants
refused  data        batch_size trigger flip mask mask_folder mask_min
applied  data        caption_dropout strict
refused  train       batch_size gradient_accumulation optimizer optimizer_args
refused  train       timesteps timestep_bias guidance warmup_steps
applied  train       steps lr lr_schedule lr_end max_grad_norm max_bad_steps
applied  train.ema   enabled decay
applied  save        every keep dtype formats
applied  sample      prompts every first width height steps guidance seed walk_seed preset
applied  sample      negative cfg cfg_start cfg_end threshold image strength mask mask_crop
applied  sample      sampler sigmas loras
applied  sample.samples prompt width height steps guidance seed
applied  sample.samples negative cfg cfg_start cfg_end threshold image strength mask mask_crop
applied  sample.samples sampler sigmas loras
refused  validation  share folder timesteps
applied  validation  every
applied  memory      limit_gib policy saved_8bit modulation optimizer_state graphs
"""
RULES = [  # (key, class) of every name in the table
    (name if section == "-" else f"{section}.{name}", kind)
    for kind, section, *names in map(str.split, _TABLE.strip().splitlines())
    for name in names
]
REFUSED, APPLIED, START = (
    {key for key, kind in RULES if kind == each} for each in ("refused", "applied", "start")
)
# settings without which a LoRA's weights mean nothing
SHAPING = {key for key in REFUSED if key.startswith("lora.")} - {"lora.dropout"} | {"model.path"}
# paths -> what the content there is called in a checkpoint; without: it makes no difference
PATHS = {
    "model.path": "weights of model.path",
    "model.encoders": "encoders",
    "model.assistant_lora": "weights of model.assistant_lora",
    "data.folder": "pictures or captions",
    "data.mask_folder": "pictures or captions",
    "validation.folder": "held-out pictures",
    **dict.fromkeys(("lora.init_from", "output_dir", "cache_dir"), ""),
}


def settings(config: Config | dict[str, Any], section: str = "") -> dict[str, Any]:
    """Returns key -> value of a configuration or its dump. An entry of `data` is `data.0.folder`
    and so on, one of `sample.samples` likewise.
    """
    dump = config.model_dump(mode="json") if isinstance(config, Config) else config
    values: dict[str, Any] = {}
    for name, value in dump.items():
        key = f"{section}{name}"
        if key in ("data", "sample.samples") and isinstance(value, list):
            value = {str(index): entry for index, entry in enumerate(value)}
        if isinstance(value, dict) and table_key(key) not in dict(RULES):
            values |= settings(value, f"{key}.")
        else:
            values[key] = OLD_POLICIES.get(str(value), value) if key == "memory.policy" else value
    return values


def table_key(key: str) -> str:
    """Returns the key as the table has it: `data.0.folder` is `data.folder`."""
    return ".".join(part for part in key.split(".") if not part.isdigit())


def changes(before: dict[str, Any], config: Config, among: set[str]) -> list[str]:
    """Returns `key was …, is …` for the settings among these that differ from the dump `before`,
    and a line where the number of data sets does. What an earlier fluxfast did not have had today's
    default; what this one does not have is left out.
    """
    was, now = settings(before), settings(config)
    entries = [sum(table_key(key) == "data.folder" for key in each) for each in (was, now)]
    fresh = {"model": {"path": "-"}, "data": [{"folder": "-"}] * entries[0]}
    was = settings(Config.model_validate(fresh)) | was
    lines = [
        f"{key} was {was[key]!r}, is {now[key]!r}"
        for key in now
        if key in was and table_key(key) in among and not _same(table_key(key), was[key], now[key])
    ]
    if entries[0] != entries[1] and "data.folder" in among:
        lines.append(f"data had {entries[0]} entries, has {entries[1]}")
    return lines


def _same(key: str, was: Any, now: Any) -> bool:
    """Returns whether two values are one, or paths to one place: ./x, absolute, by a link."""
    if was == now or key not in PATHS or not (was and now):
        return was == now
    with suppress(OSError):
        return os.path.samefile(expanded(was), expanded(now))
    return os.path.abspath(expanded(was)) == os.path.abspath(expanded(now))


def moved(before: dict[str, Any], config: Config, known: Container[str]) -> set[str]:
    """Returns the keys of paths that lead elsewhere than in the dump `before`, perhaps to the same
    content. known: the contents that the checkpoint names.

    A folder of pictures is one of them where the earlier one is gone, or has the same files.
    """
    was, now = settings(before), settings(config)
    keys = {key for key in now.keys() & was.keys() if PATHS.get(table_key(key), "") in known}
    return {
        key
        for key in keys
        if not _same(table_key(key), was[key], now[key])
        and (key.startswith("model.") or _alike(was[key], now[key]))
    }


def _alike(was: str | None, now: str | None) -> bool:
    if not (was and now and Path(now).is_dir()):
        return False
    with suppress(OSError):  # the content will tell
        return not Path(was).exists() or _listing(Path(was)) == _listing(Path(now))
    return True


def _listing(folder: Path) -> set[tuple[str, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files}


def weights_of(config: Config, parts: Parts) -> dict[str, str]:
    """Returns content -> fingerprint of what a model's parts hold, see PATHS."""
    assistant = config.model.assistant_lora
    digests = {
        "model.path": fingerprint(transformer_folder(parts.model.path)),
        "model.encoders": " ".join(component_fingerprint(parts.root, name) for name in ENCODERS),
        "model.assistant_lora": fingerprint(fetch_lora(assistant)) if assistant else "",
    }
    return {PATHS[key]: digest for key, digest in digests.items()}


def refused(config: Config, lines: list[str]) -> ConfigError:
    """Returns the error for settings that a run cannot go on with."""
    return ConfigError(
        f"{config.run_dir} was trained with other settings: {', '.join(lines)}",
        hint="set them back, choose another name (lora.init_from starts it from this one's "
        "weights), or start afresh with --restart",
    )


def check_changes(
    before: dict[str, Any], config: Config, undecided: Container[str] = ()
) -> list[str]:
    """Returns lines that report harmless changes since the dump `before` was saved.

    undecided: keys that are not compared. Raises ConfigError naming the settings that a run cannot
    go on with.
    """
    lines = changes(before, config, REFUSED)
    if other := [line for line in lines if line.split()[0] not in undecided]:
        raise refused(config, other)
    lines = []
    if applied := changes(before, config, APPLIED):
        lines.append(f"from here on with other settings: {', '.join(applied)}")
    if late := changes(before, config, START):
        lines.append(f"note: without effect on a run that has begun: {', '.join(late)}")
    return lines
