"""ai-toolkit's keys: the native key that each becomes, or why it is not read.

Keys are written from the process down (`train.lr`), those of a data set behind `datasets.`.
`fluxfast/config/ai_toolkit.py` reads a file by these rows.
"""

from fluxfast.config.key_table import (
    KeyTable,
    Mapped,
    flag,
    number,
    one_of,
    text,
    texts,
    whole,
    wholes,
)

PRECISIONS = {
    "bf16": "bf16", "bfloat16": "bf16", "float16": "fp16", "fp16": "fp16", "half": "fp16",
    "float32": "fp32", "fp32": "fp32", "float": "fp32",
}  # fmt: skip
_BIAS = {word: word for word in ("balanced", "content", "style")}

_MAPPED = {
    "training_folder": Mapped("output_dir", text),
    "device": Mapped("device", text),
    "training_seed": Mapped("seed", whole),
    "network.pretrained_lora_path": Mapped("lora.init_from", text),
    "network.dropout": Mapped("lora.dropout", number),
    "network.network_kwargs.only_if_contains": Mapped("lora.include", texts),
    "network.network_kwargs.ignore_if_contains": Mapped("lora.exclude", texts),
    "save.dtype": Mapped("save.dtype", one_of(PRECISIONS), "fp16"),
    "save.save_every": Mapped("save.every", whole, 1000),
    "save.max_step_saves_to_keep": Mapped("save.keep", whole, 5),
    "logging.log_every": Mapped("log_every", whole),
    "train.batch_size": Mapped("train.batch_size", whole, 1),
    "train.steps": Mapped("train.steps", whole, 1000),
    "train.content_or_style": Mapped("train.timestep_bias", one_of(_BIAS), "balanced"),
    "train.max_grad_norm": Mapped("train.max_grad_norm", number, 1.0),
    "train.cfg_scale": Mapped("train.guidance", number, 1.0),
    "model.name_or_path": Mapped("model.path", text),
    "model.assistant_lora_path": Mapped("model.assistant_lora", text),
    "model.extras_name_or_path": Mapped("model.encoders", text),
    "sample.sample_every": Mapped("sample.every", whole, 100),
    "sample.width": Mapped("sample.width", whole, 512),
    "sample.height": Mapped("sample.height", whole, 512),
    "sample.seed": Mapped("sample.seed", whole, 0),
    "sample.walk_seed": Mapped("sample.walk_seed", flag, False),
    "sample.guidance_scale": Mapped("sample.guidance", number, 7.0),
    "sample.sample_steps": Mapped("sample.steps", whole, 20),
    "datasets.folder_path": Mapped("data.folder", text),
    "datasets.caption_ext": Mapped("data.caption_ext", text, ".txt"),
    "datasets.default_caption": Mapped("data.default_caption", text),
    "datasets.caption_dropout_rate": Mapped("data.caption_dropout", number, 0.0),
    "datasets.resolution": Mapped("data.resolution", wholes, [512]),
    "datasets.num_repeats": Mapped("data.num_repeats", whole, 1),
    "datasets.shuffle_tokens": Mapped("data.shuffle_captions", flag, False),
    "datasets.keep_tokens": Mapped("data.keep_tokens", whole, 0),
    "datasets.flip_x": Mapped("data.flip", flag, False),
    "datasets.mask_min_value": Mapped("data.mask_min", number, 0.0),
}

_COMBINED = """
trigger_word type network.type network.linear network.rank network.linear_alpha network.alpha
model.quantize model.arch train.dtype train.optimizer train.lr train.optimizer_params
train.lr_scheduler train.lr_scheduler_params train.timestep_type train.linear_timesteps
train.linear_timesteps2 train.ema_config.use_ema train.ema_config.ema_decay
train.gradient_accumulation_steps train.gradient_accumulation train.disable_sampling
train.skip_first_sample sample.prompts sample.samples datasets datasets.alpha_mask
datasets.mask_path datasets.is_reg datasets.prior_reg datasets.trigger_word
"""

_NOTED = {
    "model.quantize": "read as storage auto: 4-bit NF4 on a GPU where ai-toolkit keeps 8-bit "
    "floats, fp32 on a CPU (--set model.storage=fp8 keeps 8-bit floats too, bf16 the base "
    "unrounded)",
    "train.ema_config.use_ema": "the average is saved as NAME_ema.safetensors; NAME.safetensors "
    "and previews hold the weights as trained, and a resumed run continues from those (ai-toolkit "
    "keeps the average alone and resumes from it)",
    "datasets.shuffle_tokens": "a few orders are drawn once for each picture "
    "(data.shuffle_variants), not a new one each time; a trigger stays in front",
    "datasets.flip_x": "a picture comes twice, mirrored or not by chance, not once in each form",
}

_IGNORED = """
ignored, progress, metrics.jsonl and TensorBoard files are written to the run folder |
    performance_log_every torch_profiler log_dir sqlite_db_path logging.use_wandb
    logging.use_ui_logger logging.project_name logging.run_name logging.verbose
ignored, nothing is uploaded: `hf upload` does it afterwards | save.push_to_hub save.hf_repo_id
    save.hf_private
ignored, the file is .safetensors in diffusers' form | save.save_format=safetensors
ignored, FLUX's transformer has no convolutions | network.conv network.conv_alpha
ignored, it belongs to LoKr | network.lokr_full_rank network.lokr_factor=-1 network.old_lokr_format
ignored, the targets are every linear of the blocks | network.all_layers
ignored, the blocks' linears alone are trained | network.transformer_only=true
ignored, training starts from the base as it is and a LoRA of zero effect | model.lora_path
    model.inference_lora_path train.start_step
ignored, a plan for the card decides which blocks are computed again; --set memory.policy=checkpoint
    computes all | train.gradient_checkpointing
ignored, the base is quantized matrix by matrix as it is read, and stays on one device |
    model.low_vram model.layer_offloading model.layer_offloading_transformer_percent
    model.layer_offloading_text_encoder_percent network.layer_offloading model.split_model_over_gpus
    model.split_model_other_module_param_count_scale
ignored, the base keeps the storage that model.quantize chose | model.qtype model.quantize_kwargs
    model.accuracy_recovery_adapter model.only_if_contains model.ignore_if_contains model.dtype
ignored, the encoders run unquantized, once, before training, and are then freed | model.quantize_te
    model.qtype_te model.text_encoder_bits=16 model.te_device model.te_dtype model.vae_device
    model.vae_dtype
ignored, model.extras_name_or_path names the encoders' folder | model.vae_path model.te_name_or_path
ignored, model.name_or_path names the transformer | model.unet_path model.model_kwargs
ignored, nothing is compiled | model.compile model.block_compile model.compile_mode
    model.compile_fullgraph model.compile_dynamic
ignored, T5's padding is attended to as in BFL's own code | model.attn_masking
ignored, it has no effect on a FLUX LoRA of text to image | model.use_flux_cfg
    model.refiner_name_or_path model.use_text_encoder_1=true model.use_text_encoder_2=true
    datasets.inpaint_path datasets.clip_image_path datasets.num_frames=1
    datasets.cache_clip_vision_to_disk datasets.controls train.train_refiner
    network.split_multistage_loras=true train.switch_boundary_every=1 datasets.do_i2v=true
    datasets.fps datasets.shrink_video_to_frames=true
ignored, the text encoders stay as they are | train.train_text_encoder
ignored, FLUX is trained by flow matching | train.noise_scheduler=flowmatch
ignored, attention is torch's | train.attention_backend train.xformers train.sdp
ignored, FLUX.1's guidance embedding stays in use | train.bypass_guidance_embedding
ignored, the loss is flow matching's squared error, weighted by timestep and mask only |
    train.loss_type=mse train.min_snr_gamma train.snr_gamma train.learnable_snr_gos
    train.do_guidance_loss train.guidance_loss_target train.diff_output_preservation
    train.diff_output_preservation_multiplier train.diff_output_preservation_class
    train.blank_prompt_preservation train.blank_prompt_preservation_multiplier
    train.inverted_mask_prior train.inverted_mask_prior_multiplier train.do_prior_divergence
    train.max_loss train.loss_target=noise train.latent_feature_extractor_path
    train.latent_feature_loss_weight train.diffusion_feature_extractor_path
    train.diffusion_feature_extractor_weight train.fft_loss datasets.loss_multiplier=1
    train.correct_pred_norm train.unconditional_prompt train.do_cfg
ignored, regularization folders are left out | train.reg_weight=1
ignored, noise, pictures and predictions are used as they are | train.noise_offset
    train.noise_multiplier=1 train.img_multiplier=1 train.latent_multiplier=1
    train.noisy_latent_multiplier=1 train.force_consistent_noise
    train.optimal_noise_pairing_samples=1 train.blended_blur_noise train.pred_scaler=1
    train.standardize_images train.standardize_latents train.weight_jitter
    datasets.standardize_images
ignored, timesteps are drawn from the whole range | train.min_denoising_steps
    train.max_denoising_steps=999|1000 train.num_train_timesteps=1000 train.next_sample_timesteps
ignored, train.lr is the one learning rate | train.unet_lr train.text_encoder_lr train.embedding_lr
    train.adapter_lr train.refiner_lr
read as always on: every caption is encoded ahead; ai-toolkit would train on the trigger or an empty
    prompt alone | train.unload_text_encoder
read as on, captions are always encoded ahead | train.cache_text_embeddings=true
    datasets.cache_text_embeddings=true
ignored, batches are run whole | train.single_item_batching
ignored, data.caption_dropout is the one dropout of captions | train.prompt_dropout_prob
ignored, the LoRA file stays apart from the base | train.merge_network_on_save
ignored, a resumed run draws no first preview | train.force_first_sample
ignored, the average is a plain one | train.ema_config.use_feedback
    train.ema_config.param_multiplier=1
ignored; --set validation.share=0.1 holds pictures out of training | validation_config
    train.validation_config
read as a cache on disk by content: an edited picture is encoded again, where ai-toolkit goes by the
    file's name and keeps the old latent | datasets.cache_latents_to_disk= datasets.cache_latents=
ignored, pictures keep their aspect in buckets and are cropped at the center | datasets.random_crop
    datasets.square_crop datasets.random_scale datasets.scale=1 datasets.buckets=true
    datasets.bucket_tolerance datasets.poi
ignored, one thread reads batches ahead from the cache | datasets.num_workers
    datasets.prefetch_factor datasets.fast_image_size
ignored, pictures are mirrored left to right only | datasets.flip_y
ignored, pictures are not augmented | datasets.augmentations datasets.augments
    datasets.shuffle_augmentations
ignored, every data set trains the LoRA at full strength | datasets.network_weight=1
ignored, captions are used whole | datasets.token_dropout_rate datasets.use_short_captions
    datasets.random_triggers datasets.random_triggers_max datasets.replacements
    train.short_and_long_captions
ignored, FLUX.1 takes no negative prompt | sample.neg train.negative_prompt
ignored, previews are drawn by flow matching | sample.sampler=flowmatch
ignored, previews start at once | sample.sample_start_step
ignored, previews are PNG files | sample.format=png
ignored, previews use the base settings of the sample section | sample.network_multiplier=1
    sample.guidance_rescale sample.num_frames=1 sample.fps sample.extra_values
    sample.adapter_conditioning_scale first_sample
"""

# ignoring these would train something else
_REFUSED = """
is not a plain LoRA training | adapter embedding decorator slider network.lorm
must be true: there is nothing else to train | train.train_unet=true
must be true: FLUX.1 is the one family that fluxfast trains | model.is_flux=true
is another model: fluxfast trains FLUX.1 | model.is_xl model.is_v2 model.is_v3 model.is_pixart
    model.is_pixart_sigma model.is_auraflow model.is_lumina2 model.is_ssd model.is_vega
    model.is_v_pred
is not supported: save the masks inverted | datasets.invert_mask
is not supported: no control pictures are read | datasets.control_path
is not supported: no paired pictures are read | datasets.unconditional_path
is not supported: give folder_path | datasets.dataset_path
"""

TABLE = KeyTable(_MAPPED, _IGNORED, _REFUSED, _NOTED, _COMBINED)

# ---------------------------------------------------------------- words of combined keys

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

# theirs -> (ours, warm-up steps by default, what differs)
SCHEDULES = {
    "constant": ("constant", 0, None),
    "constant_with_warmup": ("constant", 1000, None),
    "linear": (
        "linear",
        0,
        "read as a fall from lr to 0; ai-toolkit's would rise from a third of lr to lr unless "
        "start_factor is 1 and end_factor 0",
    ),
    "polynomial": ("linear", 0, "read as linear, from lr to 0"),
    "cosine": ("cosine", 0, None),
    "cosine_with_restarts": ("cosine", 0, None),  # its first period is the whole run
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
