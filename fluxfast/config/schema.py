"""The configuration: what a YAML file may say, field by field, and how a file becomes one. Imports
neither torch nor any trainer code.
"""

import difflib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from fluxfast.config.ai_toolkit import convert_ai_toolkit, is_ai_toolkit
from fluxfast.config.ai_toolkit_keys import TABLE
from fluxfast.config.key_table import check_owner
from fluxfast.config.kohya import KohyaFile, insert_kohya, preview_of, settle_kohya
from fluxfast.config.yaml_io import (
    apply_override,
    check_path,
    check_texts,
    dump_yaml,
    insert_layers,
    read_mapping,
)
from fluxfast.errors import ConfigError
from fluxfast.util.files import expanded

log = logging.getLogger(__name__)

# the upper ends are beyond all use: they keep a slip from ending in a full memory
Positive = Annotated[int, Field(ge=1, le=10**9)]
Few = Annotated[int, Field(ge=1, le=10**4)]
Pixels = Annotated[int, Field(ge=1, le=2**14)]
Guidance = Annotated[float, Field(ge=-1e4, le=1e4)]
Cfg = Annotated[float, Field(ge=0, le=1e4)]
Seed = Annotated[int, Field(ge=-1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
OneOrMany = BeforeValidator(lambda value: value if isinstance(value, list) else [value])
LONGEST_NAME = 150  # bytes
# what makes a path of a name, or may be in no file's name on Windows; there its devices, too
ON_WINDOWS = r"|[ .]+$|^(?=(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))"
NOT_IN_FILES = re.compile(r'[/\\:*?"<>|]' + ON_WINDOWS * (os.name == "nt"), re.IGNORECASE)
PathText = Annotated[str, BeforeValidator(check_path)]  # or a Hub id
AnyPath = Annotated[Path, BeforeValidator(check_path), AfterValidator(expanded)]
# names of memory.policy in fluxfast 0.1: in users' files and in saved runs
OLD_POLICIES = {"u8": "gelu_int8", "8bit": "int8", "fc1": "recompute_mlp", "replay": "checkpoint"}


class Section(BaseModel):
    """A mapping of settings; the string below a field is its description in docs/config.md."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_words(cls, value, info):
        annotation = cls.model_fields[info.field_name].annotation
        kind = get_origin(annotation) or annotation
        several = isinstance(kind, type) and issubclass(kind, list | dict | Section)
        if value is None and several:
            return [] if kind is list else {}  # a key whose lines below are all commented out
        # pydantic would read `steps: yes` as 1
        if isinstance(value, bool) and annotation is not bool and not several:
            raise ValueError("takes a value, not true or false (as words: in quotes)")
        none = isinstance(value, str) and value.lower() in ("none", "null", "nil")
        if none and type(None) in get_args(annotation):
            raise ValueError("takes null, or leave the key out, for none")
        return value


_Section = TypeVar("_Section", bound=Section)


class ModelConfig(Section):
    path: PathText = Field(min_length=1)
    """Diffusers folder, one .safetensors or GGUF file, or Hub id."""
    encoders: PathText | None = None
    """Diffusers folder or Hub id with vae/, text_encoder/, text_encoder_2/ and the tokenizers, an
    all-in-one file, or a folder with CLIP-L, T5 and VAE files. Needed when `path` is a file of the
    transformer alone."""
    storage: Literal["auto", "fp32", "bf16", "nf4", "int8", "fp8"] = "auto"
    """How the frozen base is stored. auto: as a prequantized file has it; else fp32 on a CPU, nf4
    on a GPU, and from 40 GiB the 8 bits of compute."""
    double_quant: bool = False
    """nf4 only: quantize the block scales as well. A file in NF4 keeps its own."""
    compute: Literal["auto", "fp32", "bf16", "int8", "fp8"] = "auto"
    """int8, fp8: the linears of the blocks multiply in 8 bits, all else runs in bf16 or fp32. auto:
    by the generation of the GPU; on a CPU bf16 if it multiplies that in hardware, else fp32."""
    layers: dict[str, Literal["8bit", "rotate", "bf16"]] = {}
    """Layer name or glob (quoted if it starts with *) -> 8bit, rotate (8 bits, behind a Hadamard
    rotation) or bf16 (dense); the last match wins. Or the path of the file that `fluxfast check`
    wrote."""
    assistant_lora: PathText | None = Field(default=None, min_length=1)
    """LoRA file or Hub id that acts, frozen, during training only: what schnell needs."""
    max_sequence_length: Few | None = None
    """T5 tokens. Default: 512 for dev, 256 for schnell; at most the tokenizer's own limit."""


class LoraConfig(Section):
    rank: Few = 16
    """Rank of each LoRA update."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """The update is scaled by alpha / rank. Default: alpha = rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout of the LoRA's input, during training."""
    targets: Literal["attn", "attn+mlp", "all"] = "attn+mlp"
    """Which linears get an update; `all` adds the modulation linears of every block."""
    include: list[str] = []
    """Train only these of the targets: substrings or globs of BFL or diffusers names."""
    exclude: list[str] = []
    """Do not train these targets; wins over include."""
    share_a: bool = False
    """One A for q, k, v (and mlp), as kohya has it."""
    init_from: AnyPath | None = None
    """LoRA file of any format, of the same rank, to start from."""


class DataConfig(Section):
    folder: AnyPath
    """Folder of jpg, png, webp, avif, bmp, gif, tiff; heic with pillow-heif."""
    recursive: bool = True
    """Search the folders below it as well."""
    resolution: Annotated[
        list[Annotated[int, Field(ge=64, le=2**14)]], Field(min_length=1), OneOrMany
    ] = [1024]
    """One or several; each image appears once per entry."""
    num_repeats: Few = 1
    """How often each image counts in an epoch."""
    batch_size: Few | None = None
    """Samples per batch of this entry's images. Default: train.batch_size."""
    caption_ext: str = ".txt"
    """Extension of the caption files beside the images; metadata.jsonl is read as well."""
    default_caption: str | None = None
    """For images that have no caption."""
    caption_prefix: str | None = None
    """Put in front of each caption with a space, before any shuffling."""
    caption_suffix: str | None = None
    """Put behind each caption with a space, before any shuffling."""
    trigger: str | None = Field(default=None, max_length=1000)
    """Replaces [trigger] in this entry's captions, and is put in front of those without it; the
    trigger of the run, where there is one as well, goes in front of that."""
    caption_dropout: Share = 0.05
    """Share of samples trained with the empty prompt."""
    shuffle_captions: bool = False
    """Shuffle the comma-separated parts."""
    keep_tokens: NonNegativeInt = 1
    """Parts at the front that the shuffle leaves in place."""
    shuffle_variants: Few = 4
    """Shuffled captions that are cached per image."""
    flip: bool = False
    """Train the mirrored image half of the time."""
    mask: Literal["none", "alpha", "folder"] = "none"
    """Weights the loss per place: by the image's alpha channel, or by the masks of a folder."""
    mask_folder: AnyPath | None = None
    """Masks with the images' relative names."""
    mask_min: Share = 0.0
    """Loss weight where the mask is black."""
    strict: bool = False
    """A picture or caption that cannot be used is an error, not skipped."""

    @field_validator("caption_ext")
    @classmethod
    def _with_dot(cls, value):
        value = value if value.startswith(".") else f".{value}"
        if not re.fullmatch(r"(\.[^./\\]+)+", value):
            raise ValueError("takes a file name extension such as .txt")
        return value

    @model_validator(mode="after")
    def _mask_folder(self):
        if (self.mask == "folder") != (self.mask_folder is not None):
            raise ValueError("takes mask: folder and mask_folder together")
        return self


class EmaConfig(Section):
    enabled: bool = False
    """Save an exponential moving average of the weights as NAME_ema.safetensors."""
    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    """Decay per step."""


class TrainConfig(Section):
    steps: Positive = 2000
    """Optimizer steps."""
    batch_size: Few = 1
    """Samples per batch, of all GPUs together."""
    gradient_accumulation: Few = 1
    """Batches whose gradients are added per step."""
    lr: Annotated[float, Field(gt=0, le=1e4)] | None = None
    """Learning rate. Default: 1e-4; 1.0 for prodigy."""
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "schedulefree", "adafactor"] = "adamw"
    optimizer_args: dict[str, Any] = {}
    """Passed to the optimizer as they are."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_end: Annotated[float, Field(ge=0, le=1e4)] = 0.0
    """Learning rate to which linear and cosine fall."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are clipped to this norm. null: no clipping."""
    timesteps: Literal["sigmoid", "uniform", "flux_shift", "linear", "linear2", "weighted"] = (
        "sigmoid"
    )
    """Distribution of the timesteps. linear: uniform with a bell-shaped loss weight. linear2:
    likewise, held at the bell's top in the less noisy half. weighted: uniform with ai-toolkit's
    weights, which rise towards noise."""
    timestep_bias: Literal["balanced", "content", "style"] = "balanced"
    """content: more noise, layout. style: less noise, detail."""
    guidance: Guidance | None = 1.0
    """Fed to dev's guidance embedding while training. null: the embedding is left out, as Flex.1 is
    trained."""
    max_bad_steps: Positive = 10
    """So many steps in a row without a finite loss and gradient end a run."""
    ema: EmaConfig = EmaConfig()

    @model_validator(mode="after")
    def _fall(self):
        if self.lr_end and self.lr_schedule == "constant":
            raise ValueError("takes lr_end with lr_schedule: linear or cosine")
        return self


class SaveConfig(Section):
    every: NonNegativeInt = 250
    """Steps between checkpoints. 0: at the end only."""
    keep: Positive = 4
    """How many of the newest checkpoints stay."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Precision of the LoRA file."""
    formats: Annotated[
        list[Literal["diffusers", "kohya", "comfyui", "xlabs", "bfl"]], Field(min_length=1)
    ] = ["diffusers"]
    """The first is NAME.safetensors, others NAME_FORMAT.safetensors beside it."""


ScaleMode = Literal[
    "constant", "linear_down", "cosine_down", "half_cosine_down", "linear_up", "cosine_up",
    "half_cosine_up", "power_up", "power_down", "linear_repeating", "cosine_repeating", "sawtooth"
]  # fmt: skip


class ThresholdConfig(Section):
    """Dynamic thresholding of `cfg`; the names are those of sd-dynamic-thresholding."""

    mimic_scale: Cfg = 7.0
    """The scale whose range of values is kept."""
    threshold_percentile: Share = 1.0
    """AD: share of the values that must fit, 1 all."""
    mimic_mode: ScaleMode = "constant"
    """How mimic_scale changes over the steps."""
    mimic_scale_min: Cfg = 0.0
    cfg_mode: ScaleMode = "constant"
    """How cfg changes over the steps."""
    cfg_scale_min: Cfg = 0.0
    sched_val: Annotated[float, Field(gt=0, le=100)] = 1.0
    """The exponent of the power modes, the periods of those that repeat."""
    separate_feature_channels: bool = True
    scaling_startpoint: Literal["MEAN", "ZERO"] = "MEAN"
    variability_measure: Literal["AD", "STD"] = "AD"
    """AD: the greatest deviation. STD: the standard deviation."""
    interpolate_phi: Share = 1.0
    """1: thresholded. 0: plain cfg."""
    schedule: Literal["constant", "steps", "comfyui"] = "constant"
    """What the modes go by. steps: the share of the steps done. comfyui: as ComfyUI's node does
    with FLUX, where each mode stands still at its end (half_cosine_up: a factor of 0.46)."""

    @model_validator(mode="after")
    def _scheduled(self):
        modes = {self.mimic_mode, self.cfg_mode, "constant"}
        if self.schedule == "constant" and len(modes) > 1:
            raise ValueError("mimic_mode and cfg_mode need schedule: steps, or comfyui")
        return self


# what people copy from each other's workflows for FLUX
THRESHOLD_PRESET = {
    "mimic_mode": "half_cosine_up",
    "cfg_mode": "half_cosine_up",
    "interpolate_phi": 0.7,
    "schedule": "comfyui",
}


SAMPLE_PRESETS = {
    "schnell": {"steps": 4},
    "turbo": {"steps": 8, "loras": [{"file": "alimama-creative/FLUX.1-Turbo-Alpha"}]},
}


class SampleLoRA(Section):
    file: PathText
    """A LoRA file of any format, or a Hub id."""
    strength: Annotated[float, Field(ge=-100, le=100)] = 1.0


class Drawing(Section):
    negative: str = ""
    """What the picture must not show: the prompt of the second pass of cfg."""
    cfg: Cfg | None = None
    """Scale of classifier-free guidance, true CFG: two passes a step. Default: none, 1."""
    cfg_start: Share = 0.0
    cfg_end: Share = 1.0
    """Shares of the steps between which cfg acts; one pass in the others."""
    threshold: ThresholdConfig | None = None
    """Dynamic thresholding: a mapping, or `preset`."""
    image: AnyPath | None = None
    """A picture to start from (image to image)."""
    strength: Share = 0.6
    """The share of the steps that is done with `image`: 1 all, as without it. A picture of 1024 px
    is two thirds noise (t 0.68) at 0.4 already, and 0.83 at 0.6."""
    mask: AnyPath | None = None
    """Inpainting: white is painted anew, black stays."""
    mask_crop: NonNegativeInt | None = None
    """Only what the mask covers, with so many pixels around it, is drawn at the full size."""
    sampler: Literal["euler", "heun"] = "euler"
    sigmas: Literal["flux", "simple", "beta"] = "flux"
    """Where the steps lie. flux: FLUX's shift by the picture's size. simple: the same shift at
    every size, as ComfyUI does. beta: flux's, denser at both ends."""
    loras: list[SampleLoRA] = []
    """LoRAs that act in sampling only, for fewer steps, say."""

    @field_validator("threshold", mode="before")
    @classmethod
    def _preset(cls, value):
        return THRESHOLD_PRESET if value == "preset" else value


class DrawConfig(Drawing):
    """How one picture is drawn: by `fluxfast sample`, or as a preview."""

    @model_validator(mode="after")
    def _belong_together(self):
        needs = {"negative": "cfg", "threshold": "cfg", "mask": "image", "mask_crop": "mask"}
        for given, needed in needs.items():
            if getattr(self, given) not in (None, "") and getattr(self, needed) is None:
                raise ValueError(f"{given} needs {needed}")
        if self.image is None and self.strength != 0.6:
            raise ValueError("strength needs image")
        if self.cfg is None and (self.cfg_start, self.cfg_end) != (0.0, 1.0):
            raise ValueError("cfg_start and cfg_end need cfg")
        if self.cfg_start >= self.cfg_end:
            raise ValueError("cfg_start must be below cfg_end")
        return self


class PreviewConfig(Drawing):
    """Previews after those of `prompts`, each with settings of its own. What an entry leaves out is
    the section's. `size: [1344, 768]`, or one number, is width and height."""

    prompt: str
    width: Pixels | None = None
    height: Pixels | None = None
    steps: Few | None = None
    guidance: Guidance | None = None
    seed: Seed | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_sections(cls, raw):
        if not isinstance(raw, dict):
            return raw
        size = raw.get("size")  # width and height in one
        if isinstance(size, list) and len(size) == 2:
            raw = raw | {"width": size[0], "height": size[1]}
        elif isinstance(size, int):
            raw = raw | {"width": size, "height": size}
        elif size is not None:
            raise ValueError("takes size: 1024, or [width, height]")
        return {key: v for key, v in raw.items() if v is not None and key != "size"}

    @model_serializer(mode="wrap")
    def _the_sections_is_null(self, to_dict):
        own = self.model_fields_set
        return {key: value if key in own else None for key, value in to_dict(self).items()}


class SampleConfig(Drawing):
    """How previews are drawn; an entry's own settings come before these."""

    prompts: list[str] = []
    """Previews drawn while training; [trigger] is replaced. An entry may be a mapping, as those of
    samples, or a line of kohya's: a cat --n dogs --l 3 --w 512."""
    samples: list[PreviewConfig] = []
    preset: Literal["schnell", "turbo"] | None = None
    """Few steps, where no setting here says otherwise. schnell: 4 steps. turbo: 8 steps, with the
    LoRA for them of alimama-creative/FLUX.1-Turbo-Alpha."""
    every: NonNegativeInt = 250
    """Steps between previews. 0: before the first step and at the end only."""
    first: bool = True
    """Draw previews before the first step, too."""
    width: Pixels = 1024
    height: Pixels = 1024
    steps: Few = 20
    """Steps of the sampler."""
    guidance: Guidance = 4.0
    """Fed to dev's guidance embedding."""
    seed: Seed = 42
    """Seed of the noise. -1: drawn when the run begins."""
    walk_seed: bool = False
    """Give each prompt its own seed: seed, seed + 1, …"""

    @model_validator(mode="before")
    @classmethod
    def _mappings_among_prompts(cls, raw):
        if not isinstance(raw, dict):
            return raw
        preset, prompts = SAMPLE_PRESETS.get(str(raw.get("preset")), {}), raw.get("prompts")
        if isinstance(own := raw.get("loras"), list) and own:  # beside the preset's
            files = [each.get("file") for each in own if isinstance(each, dict)]
            added = [each for each in preset.get("loras", []) if each["file"] not in files]
            raw = raw | {"loras": added + own}
        raw = preset | {key: value for key, value in raw.items() if value != [] or key != "loras"}
        if isinstance(prompts, list):
            entries = [isinstance(p, str) and preview_of(p) or p for p in prompts]
            if any(isinstance(each, dict) for each in entries):
                entries = [each if isinstance(each, dict) else {"prompt": each} for each in entries]
                more = raw.get("samples") or []
                if isinstance(more, list):
                    return {**raw, "prompts": [], "samples": entries + more}
        return raw

    def drawn(self, index: int) -> DrawConfig:
        """Returns how preview `index` is drawn, those of `samples` after those of `prompts`."""
        raw = self.model_dump(include=set(Drawing.model_fields))
        if (place := index - len(self.prompts)) >= 0:
            own = self.samples[place].model_dump(include=set(Drawing.model_fields))
            raw |= {key: value for key, value in own.items() if value is not None}
        return DrawConfig.model_validate(raw)

    def all_drawn(self) -> list[DrawConfig]:
        """Returns how each preview is drawn."""
        return [self.drawn(index) for index in range(len(self.prompts) + len(self.samples))]

    @model_validator(mode="after")
    def _each_can_be_drawn(self):
        for index in range(len(self.prompts) + len(self.samples)):
            try:
                self.drawn(index)
            except ValidationError as error:
                (first, *_) = error.errors()
                words = first["msg"].removeprefix("Value error, ")
                raise ValueError(f"preview {index}: {words}") from None
        return self

    @model_validator(mode="after")
    def _whole_patches(self):
        # rounded down as diffusers and kohya do: the VAE's 8 pixels, and patches of 2 latents
        changed = {}
        for picture in (self, *self.samples):
            for key in ("width", "height"):
                side = getattr(picture, key)
                whole = side and max(16, side - side % 16)
                if whole != side:
                    setattr(picture, key, whole)
                    changed[f"{key} {side}"] = whole
        for asked, whole in changed.items() if self.prompts or self.samples else ():
            log.warning(f"note: previews of {asked} are drawn at {whole}, a multiple of 16")
        return self


class ValidationConfig(Section):
    share: Annotated[float, Field(ge=0.0, le=0.9)] = 0.0
    """Share of the pictures held out of training. 0: none."""
    folder: AnyPath | None = None
    """A folder of held-out pictures instead."""
    every: Positive = 100
    """Steps between measurements; also before the first step."""
    timesteps: Few = 4
    """Fixed timesteps at which each picture's loss is measured."""

    @model_validator(mode="after")
    def _one_source(self):
        if self.share and self.folder:
            raise ValueError("takes share or folder, not both")
        return self


class MemoryConfig(Section):
    limit_gib: PositiveFloat | None = None
    """GPU memory that a run may fill. Default: what is free at its start."""
    policy: Literal[
        "auto", "keep", "gelu_int8", "int8", "recompute_mlp", "offload", "checkpoint"
    ] = "auto"
    """What every block does with its activations. auto: the fastest mix that fits. keep: keep them.
    gelu_int8: store the MLP's in 8 bits. int8: store all in 8 bits. recompute_mlp: compute the
    MLP's again in backward. offload: move them to the host. checkpoint: compute the block again."""
    saved_8bit: Literal["none", "u", "all"] = "u"
    """Which activations auto may store in 8 bits. u: those of the MLP's GELU."""
    modulation: Literal["auto", "in_place", "ahead", "host"] = "auto"
    """Where frozen modulation is computed. ahead: for coming samples. host: likewise, with its
    weights in host memory."""
    optimizer_state: Literal["auto", "device", "host"] = "auto"
    graphs: bool = True
    """Use CUDA graphs, one per picture size."""

    @field_validator("policy", mode="before")
    @classmethod
    def _renamed(cls, value):
        if isinstance(value, str) and value in OLD_POLICIES:
            log.warning(f"note: memory.policy: {value} is called {OLD_POLICIES[value]} now")
            return OLD_POLICIES[value]
        return value


class Config(Section):
    name: str = "lora"
    """Name of the run folder and the LoRA file."""
    output_dir: AnyPath = Path("runs")
    """Folder of the run folders."""
    cache_dir: AnyPath | None = None
    """Default: OUTPUT_DIR/cache."""
    seed: Seed = 42
    """Seed of every random number of a run. -1: drawn when the run begins, and recorded in its
    config.yaml."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    trigger: str | None = Field(default=None, max_length=1000)
    """Replaces [trigger] in captions, and is put in front of captions without it."""
    log_every: Positive = 10
    """Steps between metric lines."""
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: Annotated[list[DataConfig], Field(min_length=1), OneOrMany]
    """One entry or several. A path that ends in .toml or .json is kohya's data set, read in
    place."""
    train: TrainConfig = TrainConfig()
    save: SaveConfig = SaveConfig()
    sample: SampleConfig = SampleConfig()
    validation: ValidationConfig = ValidationConfig()
    memory: Annotated[
        MemoryConfig, BeforeValidator(lambda value: {} if value == "auto" else value)
    ] = MemoryConfig()
    """`auto`, or a mapping of what is not left to it."""

    @field_validator("name")
    @classmethod
    def _file_name(cls, value):
        if not value.isprintable() or re.search(r"^[ .~/\\-]|^$", value):
            raise ValueError("takes a printable name with no space . ~ - / \\ in front")
        # file systems take 255 bytes, and files have endings
        if len(value.encode()) > LONGEST_NAME:
            raise ValueError(f"is longer than {LONGEST_NAME} bytes")
        if (name := NOT_IN_FILES.sub("_", value)) != value:
            log.warning(f"note: name {value!r} is {name!r} in names of the run's folder and files")
        return name

    @field_validator("device")
    @classmethod
    def _known_device(cls, value):
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError("takes auto, cpu, cuda or cuda:N")
        return value

    @model_validator(mode="after")
    def _cache_apart(self):
        if self.run_dir == self.cache_path:
            raise ValueError(
                f"have one folder for the run and the cache, {self.run_dir}: rename one"
            )
        return self

    @property
    def batch_sizes(self) -> list[int]:
        """Of each entry of `data`."""
        return [data.batch_size or self.train.batch_size for data in self.data]

    @property
    def triggers(self) -> list[str]:
        """The run's trigger, then those of the data, each once."""
        words = [self.trigger, *(data.trigger for data in self.data)]
        return list(dict.fromkeys(word.strip() for word in words if word and word.strip()))

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name

    @property
    def cache_path(self) -> Path:
        return self.cache_dir or self.output_dir / "cache"


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides (values are YAML), validates.

    An ai-toolkit file is translated first, kohya's data sets as in `build_config`; each key of
    theirs that is ignored or read differently is logged as a warning. Raises ConfigError for an
    unreadable file, an unknown key (naming the nearest one) or a bad value.
    """
    check_owner(Path(path))
    raw, notes, source = read_mapping(Path(path), "the configuration"), [], str(path)
    if is_ai_toolkit(raw):
        check_texts(raw)  # before its mistakes are quoted
        try:
            raw, notes = convert_ai_toolkit(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}", hint=error.hint) from None
        source = f"{path}, with ai-toolkit's keys translated"
    config = build_config(raw, overrides, source)
    for note in notes:
        log.warning(f"note: {note}")
    return config


def build_config(raw: dict, overrides: Sequence[str] = (), source: str = "the settings") -> Config:
    """Validates a mapping with `a.b=c` overrides on top. Raises ConfigError.

    A .toml named in `data` is read as kohya's data set; each key of it that is ignored or read
    differently is logged as a warning. A path in `model.layers` is replaced by that file's layers.
    """
    files: list[KohyaFile] = []
    for override in overrides:
        if override.startswith("data="):
            files.clear()
        elif override.startswith("data."):  # it may reach into what a .toml says
            insert_kohya(raw, files)
        elif override.startswith("model.layers."):  # likewise
            insert_layers(raw)
        apply_override(raw, override)
    insert_kohya(raw, files)
    insert_layers(raw)
    notes = settle_kohya(raw, files)
    check_texts(raw)
    if files:
        source += f", with the keys of {', '.join(str(f.path) for f in files)} translated"
    config = validated(Config, raw, source)
    for note in notes:
        log.warning(f"note: {note}")
    return config


def validated(section: type[_Section], raw: dict, source: str) -> _Section:
    """Raises ConfigError with every mistake, in the words of the settings."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        mistakes = [_describe(mistake) for mistake in error.errors()]
        if len(mistakes) > _MOST:
            mistakes[_MOST:] = [f"and {len(mistakes) - _MOST} more"]
        raise ConfigError(
            f"{source}: {'; '.join(mistakes)}",
            hint="docs/config.md lists every setting; examples/ holds complete files",
        ) from None


def dump_config(config: Config) -> str:
    """Returns the resolved configuration as YAML that `load_config` reads back to the same."""
    return dump_yaml(config.model_dump(mode="json"))


# ---------------------------------------------------------------- messages

_MOST = 20  # mistakes that are listed
_SHOWN = 80  # characters of a key or a value
# pydantic's kinds of errors -> what the setting takes, with values of the error's own
_TAKES = {
    kind: words
    for kinds, words in {
        "string_type path_type": "takes text",
        "int_type int_parsing int_from_float int_parsing_size": "takes a whole number",
        "float_type float_parsing": "takes a number",
        "finite_number": "takes a finite number",
        "bool_type bool_parsing": "takes true or false",
        "greater_than": "takes a number above {gt:g}",
        "greater_than_equal": "takes {ge:g} or more",
        "less_than": "takes a number below {lt:g}",
        "less_than_equal": "takes {le:g} or less",
        "literal_error": "takes {expected}",
        "list_type": "takes a list: [a, b]",
        "dict_type": "takes a mapping of names to values",
        "model_type": "takes a mapping of settings",
        "too_short": "takes one entry or more",
        "string_too_short": "is empty",
        "string_too_long": "takes at most {max_length} characters",
        "invalid_key": "is no text, as keys are",
        "value_error": "{error}",
    }.items()
    for kind in kinds.split()
}


def _describe(mistake: Any) -> str:
    """Returns one of pydantic's errors as a clause: the setting, what is wrong, the value."""
    where, value = _cut(".".join(map(str, mistake["loc"])) or "settings"), mistake["input"]
    shown = f" (got {_cut(repr(value))})"
    if mistake["type"] == "extra_forbidden":
        return f"unknown key {where!r}{_suggest(mistake['loc'])}"
    if mistake["type"] == "missing":
        return f"{where} is missing"
    takes = _TAKES.get(mistake["type"], "{msg}").format(**mistake, **mistake.get("ctx", {}))
    if mistake["type"] == "literal_error":
        words = re.findall("'(.*?)'", mistake["ctx"]["expected"])
        close = difflib.get_close_matches(str(value).lower(), words, n=1)
        shown += f", did you mean {close[0]!r}?" if close else ""
    if value is None:
        return f"{where} has no value; it {takes}"
    if takes == "takes text" and isinstance(value, int | float):
        takes += ": put it in quotes"
    return f"{where} {takes}{shown if not isinstance(value, dict) else ''}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


# what other trainers call the same setting: spelling distance cannot find these
_SYNONYMS = {key.rpartition(".")[2]: row.native for key, row in TABLE.mapped.items()} | {
    "learning_rate": "train.lr",
    "network": "lora",
    "linear": "lora.rank",
    "network_dim": "lora.rank",
    "network_alpha": "lora.alpha",
    "linear_alpha": "lora.alpha",
    "datasets": "data",
    "trigger_word": "trigger",
    "max_train_steps": "train.steps",
    "timestep_type": "train.timesteps",
    "network_weights": "lora.init_from",
    "save_format": "save.formats",
    "gradient_checkpointing": "memory.policy",
    "low_vram": "memory.limit_gib",
}


def _suggest(location: tuple) -> str:
    """Returns `, did you mean 'x'?`: a synonym or a key of that name in any section, else the
    nearest key of this section, else of all; without one, the keys of this section.
    """
    word = str(location[-1])
    section = ".".join(part for part in location[:-1] if isinstance(part, str))
    keys = sorted(all_keys(Config))
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
    names = _SYNONYMS | {key.rpartition(".")[2]: key for key in keys}
    for choices, cutoff in ((names, 1.0), (siblings, 0.5), (names, 0.6)):
        if close := difflib.get_close_matches(word, choices, n=1, cutoff=cutoff):
            return f", did you mean {choices[close[0]]!r}?"
    return f"; known here: {', '.join(sorted(siblings))}"


def all_keys(section: type[BaseModel], prefix: str = "") -> set[str]:
    """Returns the dotted keys of a section and of those below it."""
    keys = set()
    for name, field in section.model_fields.items():
        keys.add(prefix + name)
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                keys |= all_keys(part, f"{prefix}{name}.")
    return keys
