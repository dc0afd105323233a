"""ai-toolkit's keys, one row each: the native key it becomes, or why it is not read.

Their places are written from the process down (`train.lr`; `datasets.` for each data set).
`fluxfast/config/ai_toolkit.py` walks a file through these rows.
"""

import difflib
import math
from collections.abc import Callable
from typing import Any

from fluxfast.errors import ConfigError

OFF = (None, False, 0, "", [], {})  # values that ask for nothing

# ---------------------------------------------------------------- readers: value -> value


def flag(value):
    if not isinstance(value, bool):
        raise ValueError("takes true or false")
    return value


def number(value, kind: str = "number") -> float:
    try:  # their files quote 1e-4 at times
        converted = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        converted = None
    if converted is None:
        raise ValueError(f"takes a {kind}")
    return converted if isinstance(value, str) else value


def whole(value) -> int:
    value = number(value, "whole number")
    if not math.isfinite(value) or value != int(value):
        raise ValueError("takes a whole number")
    return int(value)


def text(value) -> str:
    if not isinstance(value, str):
        raise ValueError("takes text")
    return value


def words(value) -> list[str]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise ValueError("takes a list of texts")
    return value


def wholes(value) -> list[int]:
    return [whole(item) for item in (value if isinstance(value, list) else [value])]


def mapping(value) -> dict:
    if not isinstance(value, dict):
        raise ValueError("takes a mapping of settings")
    return value


def mappings(value) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("takes a list of mappings")
    return value


def one_of(names: dict[str, str]) -> Callable:
    def read(value):
        if not isinstance(value, str) or value.lower() not in names:
            raise ValueError(f"takes one of {', '.join(names)}")
        return names[value.lower()]

    return read


PRECISIONS = {
    "bf16": "bf16", "bfloat16": "bf16", "float16": "fp16", "fp16": "fp16", "half": "fp16",
    "float32": "fp32", "fp32": "fp32", "float": "fp32",
}  # fmt: skip
precision = one_of(PRECISIONS)
bias = one_of({word: word for word in ("balanced", "content", "style")})

# ---------------------------------------------------------------- the table of their keys


def _keys(text: str) -> list[str]:
    return text.split()


# key -> (native key, reader, ai-toolkit's default; None: nothing is written)
MAPPED = {
    "training_folder": ("output_dir", text, None),
    "device": ("device", text, None),
    "training_seed": ("seed", whole, None),
    "network.pretrained_lora_path": ("lora.init_from", text, None),
    "network.dropout": ("lora.dropout", number, None),
    "network.network_kwargs.only_if_contains": ("lora.include", words, None),
    "network.network_kwargs.ignore_if_contains": ("lora.exclude", words, None),
    "save.dtype": ("save.dtype", precision, "fp16"),
    "save.save_every": ("save.every", whole, 1000),
    "save.max_step_saves_to_keep": ("save.keep", whole, 5),
    "logging.log_every": ("log_every", whole, None),
    "train.batch_size": ("train.batch_size", whole, 1),
    "train.steps": ("train.steps", whole, 1000),
    "train.content_or_style": ("train.timestep_bias", bias, "balanced"),
    "train.max_grad_norm": ("train.max_grad_norm", number, 1.0),
    "train.cfg_scale": ("train.guidance", number, 1.0),
    "model.name_or_path": ("model.path", text, None),
    "model.assistant_lora_path": ("model.assistant_lora", text, None),
    "model.extras_name_or_path": ("model.encoders", text, None),
    "sample.sample_every": ("sample.every", whole, 100),
    "sample.width": ("sample.width", whole, 512),
    "sample.height": ("sample.height", whole, 512),
    "sample.seed": ("sample.seed", whole, 0),
    "sample.walk_seed": ("sample.walk_seed", flag, False),
    "sample.guidance_scale": ("sample.guidance", number, 7.0),
    "sample.sample_steps": ("sample.steps", whole, 20),
    "datasets.folder_path": ("folder", text, None),
    "datasets.caption_ext": ("caption_ext", text, ".txt"),
    "datasets.default_caption": ("default_caption", text, None),
    "datasets.caption_dropout_rate": ("caption_dropout", number, 0.0),
    "datasets.resolution": ("resolution", wholes, [512]),
    "datasets.num_repeats": ("num_repeats", whole, 1),
    "datasets.shuffle_tokens": ("shuffle_captions", flag, False),
    "datasets.keep_tokens": ("keep_tokens", whole, 0),
    "datasets.flip_x": ("flip", flag, False),
    "datasets.mask_min_value": ("mask_min", number, 0.0),
}

# read by the functions further down, several at a time
TOGETHER = _keys("""
    type trigger_word datasets network.type network.linear network.rank network.linear_alpha
    network.alpha network.transformer_only model.quantize model.is_flux model.arch
    train.dtype train.train_unet train.optimizer train.lr train.optimizer_params
    train.lr_scheduler train.lr_scheduler_params train.timestep_type train.linear_timesteps
    train.linear_timesteps2 train.ema_config.use_ema train.ema_config.ema_decay
    train.gradient_accumulation_steps train.gradient_accumulation train.disable_sampling
    train.skip_first_sample sample.prompts sample.samples datasets.alpha_mask datasets.mask_path
    datasets.is_reg datasets.prior_reg datasets.trigger_word
""")

_LOSS = "ignored, the loss is flow matching's squared error, weighted by timestep and mask only"
_NOISE = "ignored, noise, pictures and predictions are used as they are"
_LOG = "ignored, progress, metrics.jsonl and TensorBoard files are written to the run folder"
_BASE = "ignored, the base keeps the storage that model.quantize chose"
_ENCODERS = "ignored, the encoders run unquantized, once, before training, and are then freed"
_MEMORY = "ignored, the base is quantized matrix by matrix as it is read, and stays on one device"
_COMPILE = "ignored, nothing is compiled"
_CROP = "ignored, pictures keep their aspect in buckets and are cropped at the center"
_ONE_RATE = "ignored, train.lr is the one learning rate"
_OTHER_MODEL = "ignored, it has no effect on a FLUX LoRA of text to image"
_LOADER = "ignored, one thread reads batches ahead from the cache"
_START = "ignored, training starts from the base as it is and a LoRA of zero effect"
_UPLOAD = "ignored, nothing is uploaded: `hf upload` does it afterwards"
_PREVIEW = "ignored, previews use the base settings of the sample section"

# reason -> keys: said unless the value is one of QUIET's for the key, or of OFF
IGNORED = {
    _LOG: "performance_log_every torch_profiler log_dir sqlite_db_path logging.use_wandb "
    "logging.use_ui_logger logging.project_name logging.run_name logging.verbose",
    _UPLOAD: "save.push_to_hub save.hf_repo_id save.hf_private",
    "ignored, the file is .safetensors in diffusers' form": "save.save_format",
    "ignored, FLUX's transformer has no convolutions": "network.conv network.conv_alpha",
    "ignored, it belongs to LoKr": "network.lokr_full_rank network.lokr_factor "
    "network.old_lokr_format",
    "ignored, the targets are every linear of the blocks": "network.all_layers",
    _START: "model.lora_path model.inference_lora_path train.start_step",
    "ignored, a plan for the card decides which blocks are computed again; --set "
    "memory.policy=checkpoint computes all": "train.gradient_checkpointing",
    _MEMORY: "model.low_vram model.layer_offloading model.layer_offloading_transformer_percent "
    "model.layer_offloading_text_encoder_percent network.layer_offloading "
    "model.split_model_over_gpus model.split_model_other_module_param_count_scale",
    _BASE: "model.qtype model.quantize_kwargs model.accuracy_recovery_adapter "
    "model.only_if_contains model.ignore_if_contains model.dtype",
    _ENCODERS: "model.quantize_te model.qtype_te model.text_encoder_bits model.te_device "
    "model.te_dtype model.vae_device model.vae_dtype",
    "ignored, model.extras_name_or_path names the encoders' folder": "model.vae_path "
    "model.te_name_or_path",
    "ignored, model.name_or_path names the transformer": "model.unet_path model.model_kwargs",
    _COMPILE: "model.compile model.block_compile model.compile_mode model.compile_fullgraph "
    "model.compile_dynamic",
    "ignored, T5's padding is attended to as in BFL's own code": "model.attn_masking",
    _OTHER_MODEL: "model.use_flux_cfg model.refiner_name_or_path model.use_text_encoder_1 "
    "model.use_text_encoder_2 datasets.inpaint_path datasets.clip_image_path datasets.num_frames "
    "datasets.cache_clip_vision_to_disk datasets.controls train.train_refiner "
    "network.split_multistage_loras train.switch_boundary_every datasets.do_i2v datasets.fps "
    "datasets.shrink_video_to_frames",
    "ignored, the text encoders stay as they are": "train.train_text_encoder",
    "ignored, FLUX is trained by flow matching": "train.noise_scheduler",
    "ignored, attention is torch's": "train.attention_backend train.xformers train.sdp",
    "ignored, FLUX.1's guidance embedding stays in use": "train.bypass_guidance_embedding",
    _LOSS: "train.loss_type train.min_snr_gamma train.snr_gamma train.learnable_snr_gos "
    "train.do_guidance_loss train.guidance_loss_target train.diff_output_preservation "
    "train.diff_output_preservation_multiplier train.diff_output_preservation_class "
    "train.blank_prompt_preservation train.blank_prompt_preservation_multiplier "
    "train.inverted_mask_prior train.inverted_mask_prior_multiplier train.do_prior_divergence "
    "train.max_loss train.loss_target train.latent_feature_extractor_path "
    "train.latent_feature_loss_weight train.diffusion_feature_extractor_path "
    "train.diffusion_feature_extractor_weight train.fft_loss datasets.loss_multiplier "
    "train.correct_pred_norm train.unconditional_prompt train.do_cfg",
    "ignored, regularization folders are left out": "train.reg_weight",
    _NOISE: "train.noise_offset train.noise_multiplier train.img_multiplier "
    "train.latent_multiplier train.noisy_latent_multiplier train.force_consistent_noise "
    "train.optimal_noise_pairing_samples train.blended_blur_noise train.pred_scaler "
    "train.standardize_images train.standardize_latents train.weight_jitter "
    "datasets.standardize_images",
    "ignored, timesteps are drawn from the whole range": "train.min_denoising_steps "
    "train.max_denoising_steps train.num_train_timesteps train.next_sample_timesteps",
    _ONE_RATE: "train.unet_lr train.text_encoder_lr train.embedding_lr train.adapter_lr "
    "train.refiner_lr",
    "read as always on: every caption is encoded ahead; ai-toolkit would train on the trigger or "
    "an empty prompt alone": "train.unload_text_encoder",
    "read as on, captions are always encoded ahead": "train.cache_text_embeddings "
    "datasets.cache_text_embeddings",
    "ignored, batches are run whole": "train.single_item_batching",
    "ignored, data.caption_dropout is the one dropout of captions": "train.prompt_dropout_prob",
    "ignored, the LoRA file stays apart from the base": "train.merge_network_on_save",
    "ignored, a resumed run draws no first preview": "train.force_first_sample",
    "ignored, the average is a plain one": "train.ema_config.use_feedback "
    "train.ema_config.param_multiplier",
    "ignored; --set validation.share=0.1 holds pictures out of training": "validation_config "
    "train.validation_config",
    "read as a cache on disk by content: an edited picture is encoded again, where ai-toolkit goes "
    "by the file's name and keeps the old latent": "datasets.cache_latents_to_disk "
    "datasets.cache_latents",
    _CROP: "datasets.random_crop datasets.square_crop datasets.random_scale datasets.scale "
    "datasets.buckets datasets.bucket_tolerance datasets.poi",
    _LOADER: "datasets.num_workers datasets.prefetch_factor datasets.fast_image_size",
    "ignored, pictures are mirrored left to right only": "datasets.flip_y",
    "ignored, pictures are not augmented": "datasets.augmentations datasets.augments "
    "datasets.shuffle_augmentations",
    "ignored, every data set trains the LoRA at full strength": "datasets.network_weight",
    "ignored, captions are used whole": "datasets.token_dropout_rate datasets.use_short_captions "
    "datasets.random_triggers datasets.random_triggers_max datasets.replacements "
    "train.short_and_long_captions",
    "ignored, FLUX.1 takes no negative prompt": "sample.neg train.negative_prompt",
    "ignored, previews are drawn by flow matching": "sample.sampler",
    "ignored, previews start at once": "sample.sample_start_step",
    "ignored, previews are PNG files": "sample.format",
    _PREVIEW: "sample.network_multiplier sample.guidance_rescale sample.num_frames sample.fps "
    "sample.extra_values sample.adapter_conditioning_scale first_sample",
}
IGNORED_KEYS = {key: reason for reason, keys in IGNORED.items() for key in _keys(keys)}

# the values that mean what fluxfast does anyway, where they are not those of OFF
QUIET = {
    "datasets.cache_latents_to_disk": [],
    "datasets.cache_latents": [],
    "save.save_format": ["safetensors"],
    "network.lokr_factor": [-1],
    "network.split_multistage_loras": [True],
    "model.text_encoder_bits": [16],
    "model.use_text_encoder_1": [True],
    "model.use_text_encoder_2": [True],
    "train.noise_scheduler": ["flowmatch"],
    "train.loss_type": ["mse"],
    "train.loss_target": ["noise"],
    "train.reg_weight": [1],
    "train.max_denoising_steps": [999, 1000],
    "train.num_train_timesteps": [1000],
    "train.optimal_noise_pairing_samples": [1],
    "train.switch_boundary_every": [1],
    "train.cache_text_embeddings": [True],
    "train.ema_config.param_multiplier": [1],
    "datasets.cache_text_embeddings": [True],
    "datasets.buckets": [True],
    "datasets.num_frames": [1],
    "datasets.shrink_video_to_frames": [True],
    "datasets.do_i2v": [True],
    "sample.sampler": ["flowmatch"],
    "sample.format": ["png"],
    "sample.num_frames": [1],
} | {
    key: [1]
    for key in _keys("""train.noise_multiplier train.img_multiplier train.latent_multiplier
    train.noisy_latent_multiplier train.pred_scaler datasets.scale datasets.network_weight
    datasets.loss_multiplier sample.network_multiplier""")
}

# ignoring these would train something else
REFUSED = (
    dict.fromkeys(
        ("adapter", "embedding", "decorator", "slider", "network.lorm"),
        "is not a plain LoRA training",
    )
    | {
        "datasets.invert_mask": "is not supported: save the masks inverted",
        "datasets.control_path": "is not supported: no control pictures are read",
        "datasets.unconditional_path": "is not supported: no paired pictures are read",
        "datasets.dataset_path": "is not supported: give folder_path",
    }
    | {
        f"model.is_{family}": "is another model: fluxfast trains FLUX.1"
        for family in _keys("xl v2 v3 pixart pixart_sigma auraflow lumina2 ssd vega v_pred")
    }
)

_EPS = {"eps": 1e-6}  # ai-toolkit's for the Adam family; the libraries' own is 1e-8
_NO_DECAY = {**_EPS, "weight_decay": 0.0}
_OWN_8_BIT = "read as bitsandbytes' 8-bit AdamW, ai-toolkit has an 8-bit Adam of its own"
_NEAREST_PRODIGY = "read as prodigy, which also finds its own learning rate"

# theirs -> (ours, arguments beside the file's own, what differs)
OPTIMIZERS = {
    "adamw": ("adamw", _EPS, None),
    "adam": ("adamw", _NO_DECAY, None),  # without decay Adam and AdamW are one
    "adamw8bit": ("adamw8bit", _EPS, None),
    "adam8bit": ("adamw8bit", _NO_DECAY, None),
    "adamw8": ("adamw8bit", _NO_DECAY, _OWN_8_BIT),
    "adam8": ("adamw8bit", _NO_DECAY, _OWN_8_BIT),
    "prodigy": ("prodigy", _EPS, None),
    "prodigy8bit": ("prodigy", _EPS, "read as prodigy, whose state is kept in 32 bits"),
    "dadaptation": ("prodigy", _EPS, _NEAREST_PRODIGY),
    "dadaptationadam": ("prodigy", _EPS, _NEAREST_PRODIGY),
    "adafactor": ("adafactor", {}, None),
}

SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "polynomial": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine",  # its first period is the whole run
}

# theirs -> (ours, what differs). Their `linear` has no weight, ours is their `linear_timesteps`.
TIMESTEPS = {
    "sigmoid": ("sigmoid", None),
    "linear": ("uniform", None),
    "flux_shift": ("flux_shift", None),
    "shift": ("flux_shift", "read as flux_shift"),
    "lumina2_shift": ("flux_shift", "read as flux_shift"),
    "weighted": ("linear", "read as linear_timesteps: uniform with a bell-shaped weight"),
    "lognorm_blend": ("sigmoid", "read as sigmoid, the nearest"),
}

# where a step is a batch under `gradient_accumulation_steps`
COUNTED_IN_STEPS = (
    ("train", "steps"), ("train", "warmup_steps"), ("save", "every"), ("sample", "every")
)  # fmt: skip

KNOWN = MAPPED.keys() | set(TOGETHER) | IGNORED_KEYS.keys() | REFUSED.keys()


def flatten(node: dict, prefix: str = "", section: str = "") -> dict[str, Any]:
    """Dotted key -> value, down to the keys of the table. A key without a value is left out."""
    flat = {}
    for key, value in node.items():
        place = f"{section}{key}"
        inside = any(known.startswith(f"{prefix}{place}.") for known in KNOWN)
        if value is None or (section == "" and prefix == "" and key == "datasets"):
            continue
        if inside and isinstance(value, dict):
            flat |= flatten(value, prefix, f"{place}.")
        elif inside and f"{prefix}{place}" not in KNOWN:
            raise ConfigError(f"{place} takes a mapping of settings, got {value!r}")
        else:
            flat[place] = value
    return flat


def nearest(key: str) -> str:
    leaf = key.rpartition(".")[2]
    close = sorted(known for known in KNOWN if known.rpartition(".")[2] == leaf)
    close = close or difflib.get_close_matches(key, sorted(KNOWN), n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""
