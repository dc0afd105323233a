"""Which settings may change between a run and its continuation.

Every key is in one of three classes. `model.layers` and `train.optimizer_args` are compared whole.
"""

from typing import Any

from fluxfast.config.schema import OLD_POLICIES, Config
from fluxfast.errors import ConfigError

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


def settings(config: Config | dict[str, Any], section: str = "") -> dict[str, Any]:
    """Returns key -> value of a configuration or its dump. An entry of `data` is `data.0.folder`
    and so on.
    """
    dump = config.model_dump(mode="json") if isinstance(config, Config) else config
    values: dict[str, Any] = {}
    for name, value in dump.items():
        key = f"{section}{name}"
        if key == "data" and isinstance(value, list):
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
    and a line where the number of data sets does. A key that one side lacks (an earlier fluxfast's)
    is left out.
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
    """Returns lines that report harmless changes since the dump `before` was saved.

    Raises ConfigError naming the settings that a run cannot go on with.
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
