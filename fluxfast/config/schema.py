"""The one configuration: what a YAML file may say, field by field. Imports neither torch nor any
trainer code.
"""

import difflib
import logging
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fluxfast.config.ai_toolkit import convert_ai_toolkit, is_ai_toolkit
from fluxfast.config.kohya import KohyaFiles
from fluxfast.config.yaml_io import (
    apply_override,
    check_texts,
    dump_yaml,
    insert_layers,
    read_mapping,
)
from fluxfast.errors import ConfigError

log = logging.getLogger(__name__)

# the upper ends are beyond all use: they keep what nobody means from ending in a full memory
Positive = Annotated[int, Field(ge=1, le=10**9)]
Few = Annotated[int, Field(ge=1, le=10**4)]
Pixels = Annotated[int, Field(ge=1, le=2**14)]
Guidance = Annotated[float, Field(ge=-1e4, le=1e4)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
LONGEST_NAME = 150  # bytes
# of memory.policy, as fluxfast 0.1 had them: in users' files and in saved runs
OLD_POLICIES = {"u8": "gelu_int8", "8bit": "int8", "fc1": "recompute_mlp", "replay": "checkpoint"}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value, info):
        # pydantic would read `steps: yes` as 1
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("takes a value, not true or false")
        return value


class ModelConfig(Section):
    path: str = Field(
        min_length=1, description="diffusers folder, one .safetensors or GGUF file, or a Hub id"
    )
    encoders: str | None = Field(
        default=None,
        description="diffusers folder or Hub id with vae/, text_encoder/, text_encoder_2/ and the "
        "tokenizers, an all-in-one file, or a folder with CLIP-L, T5 and VAE files; needed when "
        "`path` is a file of the transformer alone",
    )
    storage: Literal["auto", "fp32", "bf16", "nf4", "int8", "fp8"] = Field(
        default="auto",
        description="how the frozen base is kept; auto: as a prequantized file has it, else fp32 "
        "on a CPU; nf4 on a GPU, from 40 GiB the 8 bits of compute",
    )
    double_quant: bool = Field(
        default=False,
        description="nf4 only: quantize the block scales as well; a file in NF4 keeps its own",
    )
    compute: Literal["auto", "fp32", "bf16", "int8", "fp8"] = Field(
        default="auto",
        description="int8, fp8: the blocks' linears multiply 8-bit codes, all else is bf16 or "
        "fp32; auto: on a GPU by its generation, on a CPU bf16 where it multiplies that, else fp32",
    )
    layers: dict[str, Literal["8bit", "rotate", "bf16"]] = Field(
        default={},
        description="name or glob (quoted where it starts with *) -> 8bit, rotate (8 bits, behind "
        "a Hadamard rotation) or bf16 (dense); the last match wins; or the path of what "
        "`fluxfast check` wrote",
    )
    assistant_lora: str | None = Field(
        default=None,
        min_length=1,
        description="a LoRA file or Hub id that acts, frozen, in training only: what schnell needs",
    )
    max_sequence_length: Few | None = Field(
        default=None,
        description="T5 tokens; default 512 for dev, 256 for schnell, at most the tokenizer's own",
    )


class LoraConfig(Section):
    rank: Few = Field(default=16, description="of each LoRA update")
    alpha: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="scale = alpha / rank; default alpha = rank"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="of the LoRA's input, in training"
    )
    targets: Literal["attn", "attn+mlp", "all"] = Field(
        default="attn+mlp", description="`all` adds the modulation linears of every block"
    )
    include: list[str] = Field(
        default=[],
        description="keep only these of the targets: substrings or globs of BFL or diffusers names",
    )
    exclude: list[str] = Field(default=[], description="drop these; wins over include")
    share_a: bool = Field(default=False, description="one A for q, k, v (and mlp), as kohya has it")
    init_from: Path | None = Field(
        default=None, description="a LoRA file of any format, of the same rank, to start from"
    )


class DataConfig(Section):
    folder: Path = Field(description="folder of jpg, png, webp")
    recursive: bool = Field(default=True, description="the folders below it are searched as well")
    resolution: list[Pixels] = Field(
        default=[1024], description="one or several; each image appears once per entry"
    )
    num_repeats: Few = Field(default=1, description="how often each image counts in an epoch")
    caption_ext: str = Field(
        default=".txt", description="sidecar captions; metadata.jsonl is read as well"
    )
    default_caption: str | None = Field(default=None, description="for images that have no caption")
    caption_prefix: str | None = Field(
        default=None, description="put in front of each caption with a space, before any shuffling"
    )
    caption_suffix: str | None = Field(default=None, description="put behind each caption likewise")
    caption_dropout: Share = Field(
        default=0.05, description="share of samples trained with the empty prompt"
    )
    shuffle_captions: bool = Field(default=False, description="shuffle the comma-separated parts")
    keep_tokens: Annotated[int, Field(ge=0)] = Field(
        default=1, description="parts at the front that the shuffle leaves in place"
    )
    shuffle_variants: Few = Field(
        default=4, description="how many shuffled captions are cached per image"
    )
    flip: bool = Field(default=False, description="train the mirrored image half of the time")
    mask: Literal["none", "alpha", "folder"] = Field(
        default="none", description="weights the loss per place"
    )
    mask_folder: Path | None = Field(
        default=None, description="masks with the images' relative names"
    )
    mask_min: Share = Field(default=0.0, description="loss weight where the mask is black")
    strict: bool = Field(
        default=False,
        description="a picture or caption that cannot be used is an error, not skipped",
    )

    @field_validator("resolution", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return value if isinstance(value, list) else [value]

    @field_validator("resolution")
    @classmethod
    def _some(cls, value):
        if not value or min(value) < 64:
            raise ValueError("give at least one resolution, each 64 or more")
        return value

    @field_validator("caption_ext")
    @classmethod
    def _dot(cls, value):
        value = value if value.startswith(".") else f".{value}"
        if not re.fullmatch(r"(\.[^./\\]+)+", value):
            raise ValueError("takes a file name extension such as .txt")
        return value

    @model_validator(mode="after")
    def _mask_folder(self):
        if (self.mask == "folder") != (self.mask_folder is not None):
            raise ValueError("mask: folder and mask_folder go together")
        return self


class EmaConfig(Section):
    enabled: bool = Field(
        default=False, description="save an EMA of the weights as NAME_ema.safetensors"
    )
    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(default=0.99, description="per step")


class TrainConfig(Section):
    steps: Positive = Field(default=2000, description="optimizer steps")
    batch_size: Few = 1
    gradient_accumulation: Few = Field(
        default=1, description="batches whose gradients are added per step"
    )
    lr: Annotated[float, Field(gt=0, le=1e4)] | None = Field(
        default=None, description="default 1e-4; 1.0 for prodigy"
    )
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "schedulefree", "adafactor"] = "adamw"
    optimizer_args: dict[str, Any] = Field(
        default={}, description="passed to the optimizer as they are"
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="over which the learning rate rises linearly"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="null: no clipping"
    )
    timesteps: Literal["sigmoid", "uniform", "flux_shift", "linear"] = Field(
        default="sigmoid", description="linear: uniform with a bell-shaped loss weight"
    )
    timestep_bias: Literal["balanced", "content", "style"] = Field(
        default="balanced", description="content: more noise, layout; style: less noise, detail"
    )
    guidance: Guidance = Field(
        default=1.0, description="fed to dev's guidance embedding while training"
    )
    max_bad_steps: Positive = Field(
        default=10, description="steps in a row without a finite loss and gradient that end a run"
    )
    ema: EmaConfig = EmaConfig()


class SaveConfig(Section):
    every: Annotated[int, Field(ge=0)] = Field(default=250, description="steps; 0: at the end only")
    keep: Positive = Field(default=4, description="newest checkpoints that stay")
    dtype: Literal["fp32", "fp16", "bf16"] = Field(default="fp16", description="of the LoRA file")
    formats: list[Literal["diffusers", "kohya", "comfyui", "xlabs", "bfl"]] = Field(
        default=["diffusers"],
        min_length=1,
        description="the first is NAME.safetensors, others NAME_FORMAT.safetensors beside it",
    )


class SampleConfig(Section):
    prompts: list[str] = Field(
        default=[], description="previews drawn while training; [trigger] is replaced"
    )
    every: Annotated[int, Field(ge=0)] = Field(
        default=250,
        description="steps between previews; 0: before the first step and at the end only",
    )
    first: bool = Field(default=True, description="also before the first step")
    width: Pixels = Field(default=1024, description="pixels")
    height: Pixels = Field(default=1024, description="pixels")
    steps: Few = Field(default=20, description="of the sampler")
    guidance: Guidance = Field(default=4.0, description="fed to dev's guidance embedding")
    seed: Annotated[int, Field(ge=0)] = Field(default=42, description="of the noise")
    walk_seed: bool = Field(
        default=False, description="each prompt its own seed: seed, seed + 1, …"
    )


class ValidationConfig(Section):
    share: Annotated[float, Field(ge=0.0, le=0.9)] = Field(
        default=0.0, description="share of the pictures held out of training; 0: none"
    )
    folder: Path | None = Field(default=None, description="a folder of held-out pictures instead")
    every: Positive = Field(
        default=100, description="steps between measurements; also before the first"
    )
    timesteps: Few = Field(default=4, description="fixed timesteps that each picture is judged at")

    @model_validator(mode="after")
    def _one_source(self):
        if self.share and self.folder:
            raise ValueError("give share or folder, not both")
        return self


class MemoryConfig(Section):
    limit_gib: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="of the card that a run may fill; default: what is free at its start",
    )
    policy: Literal[
        "auto", "keep", "gelu_int8", "int8", "recompute_mlp", "offload", "checkpoint"
    ] = Field(
        default="auto",
        description="what every block does with its activations; auto: the fastest mix that fits. "
        "keep them, gelu_int8: the MLP's in 8 bits, int8: all of them, recompute_mlp: compute the "
        "MLP's again in backward, offload: to the host, checkpoint: compute the block again",
    )
    saved_8bit: Literal["none", "u", "all"] = Field(
        default="u",
        description="which activations auto may keep in 8 bits: those of the MLP's GELU, all",
    )
    modulation: Literal["auto", "in_place", "ahead", "host"] = Field(
        default="auto",
        description="frozen modulation is formed ahead for coming samples; host: with its weights "
        "in host memory",
    )
    optimizer_state: Literal["auto", "device", "host"] = "auto"
    graphs: bool = Field(default=True, description="CUDA graphs, one per picture size")

    @field_validator("policy", mode="before")
    @classmethod
    def _renamed(cls, value):
        if isinstance(value, str) and value in OLD_POLICIES:
            log.warning(f"note: memory.policy: {value} is called {OLD_POLICIES[value]} now")
            return OLD_POLICIES[value]
        return value


class Config(Section):
    name: str = Field(
        default="lora", pattern=r"^[\w][\w .+-]*$", description="run folder and LoRA file name"
    )
    output_dir: Path = Field(default=Path("runs"), description="folder of the run folders")
    cache_dir: Path | None = Field(default=None, description="default: OUTPUT_DIR/cache")
    seed: Annotated[int, Field(ge=0)] = Field(
        default=42, description="of every random number of a run"
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N"
    )
    trigger: str | None = Field(
        default=None,
        max_length=1000,
        description="replaces [trigger] in captions and is put in front of captions without it",
    )
    log_every: Positive = Field(default=10, description="steps between metric lines")
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: Annotated[list[DataConfig], Field(min_length=1)] = Field(
        description="one or several; a path that ends in .toml is kohya's data set, read in place"
    )
    train: TrainConfig = TrainConfig()
    save: SaveConfig = SaveConfig()
    sample: SampleConfig = SampleConfig()
    validation: ValidationConfig = ValidationConfig()
    memory: MemoryConfig = Field(
        default=MemoryConfig(), description="auto, or a mapping of what is decided otherwise"
    )

    @field_validator("name")
    @classmethod
    def _short(cls, value):
        # file systems take 255 bytes, and files have endings
        if len(value.encode()) > LONGEST_NAME:
            raise ValueError(f"is longer than {LONGEST_NAME} bytes")
        return value

    @field_validator("output_dir", "cache_dir")
    @classmethod
    def _of_a_line(cls, value):
        # their paths are printed as they are, for scripts
        if any(unicodedata.category(letter) == "Cc" for letter in str(value)):
            raise ValueError("holds a control character")
        return value

    @field_validator("memory", mode="before")
    @classmethod
    def _auto_is_nothing(cls, value):
        return {} if value == "auto" else value

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_many_folders(cls, value):
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _cache_apart(self):
        if self.run_dir == self.cache_path:
            raise ValueError(
                f"the run and the cache would share the folder {self.run_dir}: rename one"
            )
        return self

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name

    @property
    def cache_path(self) -> Path:
        return self.cache_dir or self.output_dir / "cache"


def load_config(
    path: Path | str,
    overrides: Sequence[str] = (),
) -> Config:
    """Read a YAML file, apply `a.b=c` overrides (values are YAML), validate.

    An ai-toolkit file is converted first, kohya's data sets as in `build_config`; each key of
    theirs that is ignored or read differently is logged as a warning. Raises ConfigError for an
    unreadable file, an unknown key (naming the nearest one) or a bad value.
    """
    raw = read_mapping(Path(path), "the configuration")
    if not is_ai_toolkit(raw):
        return build_config(raw, overrides, source=str(path))
    check_texts(raw)  # before what is wrong with it is said
    try:
        raw, notes = convert_ai_toolkit(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from None
    source = f"{path}, with ai-toolkit's keys translated"
    config = build_config(raw, overrides, source)
    for note in notes:
        log.warning(f"note: {note}")
    return config


def build_config(
    raw: dict,
    overrides: Sequence[str] = (),
    source: str = "the settings",
) -> Config:
    """Validate a mapping with `a.b=c` overrides on top. Raises ConfigError.

    A .toml named in `data` is read as kohya's data set; each key of it that is ignored or read
    differently is logged as a warning. A path in `model.layers` is replaced by that file's layers.
    """
    files = KohyaFiles()
    for override in overrides:
        if override.startswith("data="):
            files = KohyaFiles()
        elif override.startswith("data."):  # which may reach into what a .toml says
            files.insert(raw)
        elif override.startswith("model.layers."):  # likewise
            insert_layers(raw)
        apply_override(raw, override)
    files.insert(raw)
    insert_layers(raw)
    files.settle(raw)
    check_texts(raw)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        if files.paths:
            source += f", with the keys of {', '.join(files.paths)} translated"
        raise ConfigError(
            f"{source}: " + describe(error.errors(), Config),
            hint="`fluxfast train --help` names the sections; examples/ holds complete files",
        ) from None
    for note in files.notes:
        log.warning(f"note: {note}")
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same."""
    return dump_yaml(config.model_dump(mode="json"))


_SHOWN = 80  # characters of a key or a value
_MOST = 20  # mistakes


def describe(errors: list[Any], config: type[BaseModel]) -> str:
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
