"""Which settings may change between a run and its continuation: every key in one of three classes.

A key names its whole value: `model.layers` and `train.optimizer_args` are mappings.
"""

from typing import Any, cast

from fluxfast.config.schema import OLD_POLICIES, Config
from fluxfast.errors import ConfigError

# refused: another value would make the saved state meaningless, or the run a mixture of two
# applied: how far, how fast, where and in what arithmetic the run goes on, and what it tells
# start: only looked at when a run begins
_TABLE = """
refused  -           name seed trigger
applied  -           output_dir cache_dir device log_every
refused  model       path encoders assistant_lora max_sequence_length
applied  model       storage double_quant compute layers
refused  lora        rank alpha dropout targets include exclude share_a
start    lora        init_from
refused  data        folder recursive resolution num_repeats caption_ext default_caption
refused  data        caption_prefix caption_suffix shuffle_captions keep_tokens shuffle_variants
refused  data        flip mask mask_folder mask_min
applied  data        caption_dropout strict
refused  train       batch_size gradient_accumulation optimizer optimizer_args
refused  train       timesteps timestep_bias guidance warmup_steps
applied  train       steps lr lr_schedule max_grad_norm max_bad_steps
applied  train.ema   enabled decay
applied  save        every keep dtype formats
applied  sample      prompts every first width height steps guidance seed walk_seed
refused  validation  share folder timesteps
applied  validation  every
applied  memory      limit_gib policy saved_8bit modulation optimizer_state graphs
"""
# train.warmup_steps: schedule-free and prodigy keep it in their state
# validation: one series is judged alike, or its best step means nothing; share is not trained on


def rules() -> list[tuple[str, str]]:
    """(key, class) of every row of the table."""
    rows = (line.split() for line in _TABLE.strip().splitlines())
    return [
        (name if section == "-" else f"{section}.{name}", kind)
        for kind, section, *names in rows
        for name in names
    ]


REFUSED, APPLIED, START = (
    {key for key, kind in rules() if kind == each} for each in ("refused", "applied", "start")
)
# what a LoRA's weights mean anything by
SHAPING = {key for key in REFUSED if key.startswith("lora.")} - {"lora.dropout"} | {"model.path"}
_KNOWN = REFUSED | APPLIED | START


def settings(config: Config | dict[str, Any]) -> dict[str, Any]:
    """Key -> value of a configuration or of its dump; an entry of `data` is `data.0.folder` and so
    on.
    """
    dump = config.model_dump(mode="json") if isinstance(config, Config) else config
    found: dict[str, Any] = {}

    def collect(value: Any, key: str) -> None:
        if key == "data" and isinstance(value, list):
            for index, entry in enumerate(value):
                collect(entry, f"data.{index}")
        elif isinstance(value, dict) and table_key(key) not in _KNOWN:
            for name, item in value.items():
                collect(item, f"{key}.{name}" if key else name)
        elif key == "memory.policy":
            found[key] = OLD_POLICIES.get(cast(str, value), value)
        else:
            found[key] = value

    collect(dump, "")
    return found


def table_key(key: str) -> str:
    """The key as the classes have it: `data.0.folder` is `data.folder`."""
    return ".".join(part for part in key.split(".") if not part.isdigit())


def changes(before: dict[str, Any], config: Config, among: set[str]) -> list[str]:
    """`key was …, is …` for settings of the classes' keys `among` that differ from the dump
    `before`. A key that one of the two lacks (of an earlier fluxfast) is left out, a data set not.
    """
    was, now = settings(before), settings(config)
    lines = [
        f"{key} was {was[key]!r}, is {now[key]!r}"
        for key in now
        if key in was and was[key] != now[key] and table_key(key) in among
    ]
    entries = [sum(table_key(key) == "data.folder" for key in each) for each in (was, now)]
    if entries[0] != entries[1] and "data.folder" in among:
        lines.append(f"data had {entries[0]} entries, has {entries[1]}")
    return lines


def check_changes(before: dict[str, Any], config: Config) -> list[str]:
    """-> what to say of settings that changed, harmlessly, since the dump `before` was saved.

    Raises ConfigError naming those that a run cannot go on with.
    """
    if refused := changes(before, config, REFUSED):
        raise ConfigError(
            f"{config.run_dir} was trained with other settings: {', '.join(refused)}",
            hint="set them back, choose another name (lora.init_from starts it from this one's "
            "weights), or start afresh with --restart",
        )
    lines = []
    if applied := changes(before, config, APPLIED):
        lines.append(f"from here on with other settings: {', '.join(applied)}")
    if late := changes(before, config, START):
        lines.append(f"note: without effect on a run that has begun: {', '.join(late)}")
    return lines
