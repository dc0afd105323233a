"""Reading another trainer's file: a table of its keys, readers of values, notes and mistakes; and
the names of those whose files are not read.
"""

import copy
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fluxfast.config.yaml_io import read_limited
from fluxfast.errors import ConfigError

OFF = (None, False, 0, "", [], {})  # values that ask for nothing

# ---------------------------------------------------------------- readers: value -> value


def typed(kind: type, words: str) -> Callable:
    """Returns a reader of values of one type."""

    def read(value):
        if not isinstance(value, kind):
            raise ValueError(f"takes {words}")
        return value

    return read


flag, text = typed(bool, "true or false"), typed(str, "text")
mapping = typed(dict, "a mapping of settings")


def number(value, kind: str = "number") -> float:
    try:  # ai-toolkit's files quote 1e-4 at times
        converted = float("no" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"takes a {kind}") from None
    return converted if isinstance(value, str) else value


def whole(value) -> int:
    value = number(value, "whole number")
    if not math.isfinite(value) or value != int(value):
        raise ValueError("takes a whole number")
    return int(value)


def wholes(value) -> list[int]:
    return [whole(item) for item in (value if isinstance(value, list) else [value])]


def _lists(kind: type, words: str) -> Callable:
    def read(value):
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise ValueError(f"takes a list of {words}")
        return value

    return read


texts, mappings = _lists(str, "texts"), _lists(dict, "mappings")


def one_of(choices: Mapping[str, Any]) -> Callable:
    """Returns a reader that takes a word of `choices`, in any case, and returns its value."""

    def read(value):
        if not isinstance(value, str) or value.lower() not in choices:
            raise ValueError(f"takes one of {', '.join(choices)}")
        return choices[value.lower()]

    return read


# ---------------------------------------------------------------- the table


class Mapped(NamedTuple):
    """A key that becomes the native one. default: the other trainer's; None writes nothing."""

    native: str
    read: Callable
    default: Any = None


class KeyTable:
    """All keys of one trainer.

    ignored, refused: a row `reason | keys` per reason, see `rows_of`. noted: key -> what differs
    where the key is on. combined: keys that only code reads. silent: keys that change nothing.
    """

    def __init__(
        self,
        mapped: dict[str, Mapped],
        ignored: str,
        refused: str,
        noted: dict[str, str],
        combined: str,
        silent: str = "",
    ):
        self.mapped, self.noted, self.silent = mapped, noted, set(silent.split())
        self.ignored, self.refused = rows_of(ignored), rows_of(refused)
        groups = (mapped, self.ignored, self.refused, combined.split(), silent.split())
        self.known = set().union(*groups)
        assert len(self.known) == sum(map(len, groups)), "a key is in two rows"

    def nearest(self, key: str, cutoff: float) -> str | None:
        """Returns a key of that name in another section, or else one of a similar spelling."""
        leaf = key.rpartition(".")[2]
        known = sorted(self.known, key=lambda key: (key.count("."), key))
        close = [each for each in known if each.rpartition(".")[2] == leaf]
        close = close or difflib.get_close_matches(key, known, n=1, cutoff=cutoff)
        return close[0] if close else None


def rows_of(text: str) -> dict[str, tuple[str, tuple]]:
    """Returns key -> (reason, quiet values) of lines `reason | keys`; indented lines go on.

    A key's quiet values, which ask for nothing, are those of OFF, or those given: `key=1|2`.
    """
    rows = {}
    for row in re.split(r"\n(?! )", text.strip()):
        reason, keys = " ".join(row.split()).split(" | ")
        for word in keys.split():
            key, equals, values = word.partition("=")
            assert key not in rows, key
            own = tuple(_plain(value) for value in values.split("|"))
            rows[key] = reason, own if equals else OFF
    return rows


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _quoted(value: Any, quiet: tuple) -> bool:
    """Returns whether a text is a quiet number, such as "1.0". OFF holds words, which are meant."""
    return quiet is not OFF and isinstance(value, str) and _plain(value) in quiet


class Translation:
    """A file's keys, the native settings they become, notes and mistakes."""

    def __init__(
        self,
        written: dict[str, tuple[str, Any]],
        notes: dict[str, str],
        mistakes: dict[str, str],
    ):
        self.written = written  # key -> (where it is written, value)
        self.notes, self.mistakes = notes, mistakes  # where it is written -> text
        self.native: dict = {}

    def get(self, key: str, read: Callable, default: Any = None) -> Any:
        """Returns a key's value through its reader; the default where it is absent or a mistake."""
        if key not in self.written:
            return default
        location, value = self.written[key]
        try:
            return read(value)
        except ValueError as error:
            self.mistakes[location] = f"{error}, got {value!r}"
            return default

    def note(self, key: str, text: str) -> None:
        self.notes[self._location(key)] = text

    def refuse(self, key: str, text: str) -> None:
        self.mistakes[self._location(key)] = text

    def _location(self, key: str) -> str:
        return self.written[key][0] if key in self.written else key

    def put(self, native: str, value: Any) -> None:
        node = self.native
        *sections, last = native.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value

    def apply(self, table: KeyTable) -> None:
        """Puts the mapped keys and their defaults; notes or refuses all others but the combined."""
        for key, (native, read, default) in table.mapped.items():
            value = self.get(key, read, copy.deepcopy(default))
            if value is not None:
                self.put(native, value)
        for key, (location, value) in self.written.items():
            for rows, reasons in ((table.ignored, self.notes), (table.refused, self.mistakes)):
                reason, quiet = rows.get(key, ("", (value,)))
                if value not in quiet and not _quoted(value, quiet):
                    reasons[location] = reason
            if key in table.noted and value not in OFF:
                self.notes[location] = table.noted[key]
            if key not in table.known:
                nearest = table.nearest(key, 0.75)
                hint = f"; did you mean {nearest}?" if nearest else ""
                self.notes[location] = f"unknown, ignored{hint}"


def note_lines(notes: dict[str, str]) -> list[str]:
    """Returns `location: note`, once for all entries of a list that have the same note."""
    places: dict[tuple[str, str], list[str]] = {}
    for location, note in notes.items():
        places.setdefault((re.sub(r"\[\d+\]", "", location), note), []).append(location)
    return [
        f"{at}{f' and {len(others)} more' if others else ''}: {note}"
        for (_, note), (at, *others) in places.items()
    ]


# ---------------------------------------------------------------- files of others

# whose file it is | keys, two of which no other file has
_OTHERS = """
SimpleTuner's configuration | model_family data_backend_config base_model_precision lora_type
    checkpoint_step_interval validation_num_inference_steps flow_schedule_shift tracker_run_name
    DATALOADER_CONFIG TRACKER_PROJECT_NAME FLUX_LORA_TARGET
SimpleTuner's list of data sets | caption_strategy instance_data_dir cache_dir_vae dataset_type
    resolution_type metadata_backend minimum_image_size
OneTrainer's configuration | training_method base_model_name concept_file_name train_dtype
    output_model_destination timestep_distribution
OneTrainer's list of concepts | include_subdirectories image_variations text_variations
    enable_crop_jitter prompt_source
the arguments of sd-scripts (kohya) | network_module train_data_dir dataset_config output_name
    t5xxl clip_l LoRA_type network_dim timestep_sampling model_prediction_type save_model_as
    network_args
the arguments of diffusers' training script | pretrained_model_name_or_path instance_data_dir
    instance_prompt class_prompt checkpointing_steps validation_epochs with_prior_preservation
XLabs' x-flux configuration | data_config img_dir img_size sample_height sample_width
musubi-tuner's list of data sets | image_directory cache_directory image_jsonl_file
    control_directory
diffusion-pipe's configuration | micro_batch_size_per_gpu pipeline_stages activation_checkpointing
    diffusers_path transformer_path save_every_n_epochs
diffusion-pipe's list of data sets | enable_ar_bucket num_ar_buckets min_ar frame_buckets
a workflow of ComfyUI | last_node_id last_link_id class_type widgets_values
"""
# bounded, or a long word would take the square of its length
_KEY = re.compile(r"""--(\w{1,40})|\b(\w{1,40})["']?[ \t]{0,20}[:=]""")


def check_owner(path: Path) -> None:
    """Raises ConfigError, saying whose it is, for a file of another trainer that is not read: also
    for a script with its arguments. A file that cannot be opened is left to its reader.
    """
    try:
        text = read_limited(path, "the configuration").decode("utf-8", "replace")
    except ConfigError:
        return
    keys = {word for found in _KEY.findall(re.sub(r"(^|\s)#.*", "", text)) for word in found}
    for row in re.split(r"\n(?! )", _OTHERS.strip()):
        owner, marks = row.split(" | ")
        if len(keys & set(marks.split())) > 1:
            raise ConfigError(
                f"{path} is {owner}, which fluxfast does not read",
                hint="`fluxfast train FOLDER --model … --set lora.rank=16` trains on its pictures; "
                "docs/getting-started.md has its settings under fluxfast's names",
            )
