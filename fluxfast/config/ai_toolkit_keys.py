"""ai-toolkit's keys: the native key that each becomes, or why it is not read.

What changes the gradient is done or refused, what changes only what comes with the LoRA is noted,
what changes neither or is switched off is not mentioned. Keys are written from the process down
(`train.lr`), those of a data set behind `datasets.`, of a preview behind `sample.samples.`.
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
# in BFL's names of linears, which lora.include and exclude look into as well
_BFL = ("img_mod.lin", "txt_mlp.0", "txt_mlp.2", ".proj", "qkv", "linear1", "linear2", "modulation")


def _names(value) -> list[str]:
    """Returns what ai-toolkit seeks in diffusers' names alone: a glob, where BFL's have it, too."""
    found = texts(value)
    return [f"transformer.*{w}*" if any(w in name for name in _BFL) else w for w in found]


_MAPPED = {
    "training_folder": Mapped("output_dir", text),
    "device": Mapped("device", text),
    "training_seed": Mapped("seed", whole),
    "network.pretrained_lora_path": Mapped("lora.init_from", text),
    "network.dropout": Mapped("lora.dropout", number),
    "network.network_kwargs.only_if_contains": Mapped("lora.include", _names),
    "network.network_kwargs.ignore_if_contains": Mapped("lora.exclude", _names),
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
    "sample.samples.prompt": Mapped("sample.samples.prompt", text),
    "sample.samples.width": Mapped("sample.samples.width", whole),
    "sample.samples.height": Mapped("sample.samples.height", whole),
    "sample.samples.seed": Mapped("sample.samples.seed", whole),
    "sample.samples.guidance_scale": Mapped("sample.samples.guidance", number),
    "sample.samples.sample_steps": Mapped("sample.samples.steps", whole),
    "sample.sample_every": Mapped("sample.every", whole, 100),
    "sample.width": Mapped("sample.width", whole, 512),
    "sample.height": Mapped("sample.height", whole, 512),
    "sample.seed": Mapped("sample.seed", whole, 0),
    "sample.walk_seed": Mapped("sample.walk_seed", flag, False),
    "sample.guidance_scale": Mapped("sample.guidance", number, 7.0),
    "sample.sample_steps": Mapped("sample.steps", whole, 20),
    "datasets.folder_path": Mapped("data.folder", text),
    "datasets.caption_ext": Mapped("data.caption_ext", text, ".txt"),
    "datasets.caption_type": Mapped("data.caption_ext", text),  # the older name, which wins
    "datasets.default_caption": Mapped("data.default_caption", text),
    "datasets.caption_dropout_rate": Mapped("data.caption_dropout", number, 0.0),
    "datasets.resolution": Mapped("data.resolution", wholes, [512]),
    "datasets.batch_size": Mapped("data.batch_size", whole),
    "datasets.num_repeats": Mapped("data.num_repeats", whole, 1),
    "datasets.shuffle_tokens": Mapped("data.shuffle_captions", flag, False),
    "datasets.keep_tokens": Mapped("data.keep_tokens", whole, 0),
    "datasets.flip_x": Mapped("data.flip", flag, False),
    "datasets.mask_min_value": Mapped("data.mask_min", number, 0.0),
}

_COMBINED = """
trigger_word type network.type network.linear network.rank network.linear_alpha network.alpha
model.quantize model.qtype model.quantize_kwargs model.accuracy_recovery_adapter model.arch
model.use_flux_cfg model.inference_lora_path
train.dtype train.optimizer train.lr train.optimizer_params train.lr_scheduler
train.lr_scheduler_params train.lr_scheduler_params.num_warmup_steps
train.lr_scheduler_params.warmup_steps train.lr_scheduler_params.eta_min
train.lr_scheduler_params.factor train.lr_scheduler_params.start_factor
train.lr_scheduler_params.end_factor train.timestep_type
train.linear_timesteps train.linear_timesteps2 train.bypass_guidance_embedding
train.unload_text_encoder train.inverted_mask_prior train.ema_config.use_ema
train.ema_config.ema_decay train.ema_config.use_feedback train.ema_config.param_multiplier
train.gradient_accumulation_steps train.gradient_accumulation train.disable_sampling
train.skip_first_sample sample.prompts sample.samples datasets datasets.alpha_mask
datasets.mask_path datasets.invert_mask datasets.trigger_word train.cache_text_embeddings
datasets.cache_text_embeddings
"""

_NOTED = {
    "model.quantize": "read as storage auto: 4-bit NF4 on a GPU where ai-toolkit keeps 8-bit "
    "floats, fp32 on a CPU (--set model.storage=fp8 keeps 8-bit floats too, bf16 the base "
    "unrounded)",
    "model.use_flux_cfg": "training leaves the guidance embedding out, as ai-toolkit does; "
    "previews are drawn with it, by guidance_scale and by true CFG of the same scale",
    "train.ema_config.use_ema": "the average is saved as NAME_ema.safetensors; NAME.safetensors "
    "and previews hold the weights as trained, and a resumed run continues from those (ai-toolkit "
    "keeps the average alone and resumes from it)",
    "datasets.shuffle_tokens": "a few orders are drawn once for each picture "
    "(data.shuffle_variants), not a new one each time; a trigger stays in front",
    "datasets.flip_x": "a picture comes twice, mirrored or not by chance, not once in each form",
}

_IGNORED = """
ignored, metrics.jsonl, TensorBoard files and a report are written to the run folder |
    logging.use_wandb
ignored, nothing is uploaded: `hf upload` does it afterwards | save.push_to_hub
ignored, the LoRA file stays apart from the base | train.merge_network_on_save
ignored, checkpoints are kept by their age | save.record_low_window_size
ignored, a resumed run draws no first preview | train.force_first_sample
ignored; --set validation.share=0.1 holds pictures out of training | validation_config
    train.validation_config
ignored, previews are drawn by flow matching | sample.sampler=flowmatch
ignored, previews start at once | sample.sample_start_step
ignored, previews are PNG files | sample.format=png|jpg
ignored, previews show the LoRA at full strength | sample.network_multiplier=1
    sample.samples.network_multiplier=1
ignored, previews are drawn without control pictures | sample.samples.ctrl_img
    sample.samples.ctrl_img_1 sample.samples.ctrl_img_2 sample.samples.ctrl_img_3
ignored, every preview is drawn by the sample section | first_sample sample.comfy
ignored, the sides of buckets are multiples of 32 pixels | datasets.bucket_tolerance=32|64
"""

# these change the gradient: ignoring one would train something else
_REFUSED = """
trains something else than a LoRA of the transformer: take it out | adapter embedding decorator
    guidance slider fizgig_slider flow_dpo do_lorm network.lorm
must be true: there is nothing else to train | train.train_unet=true
must be false: the text encoders are not trained | train.train_text_encoder
must be true: FLUX.1 is the one family that fluxfast trains | model.is_flux=true
is another model: fluxfast trains FLUX.1 | model.is_xl model.is_v2 model.is_v3 model.is_pixart
    model.is_pixart_sigma model.is_auraflow model.is_lumina2 model.is_ssd model.is_vega
    model.is_v_pred
is not supported, name_or_path names the transformer: take it out | model.unet_path
    model.refiner_name_or_path
is not supported: give a folder that holds VAE and text encoders in extras_name_or_path |
    model.vae_path model.te_name_or_path model.text_encoder_path
is not supported, nothing is fused into the base before training: merge this LoRA into it and give
    the result in name_or_path | model.lora_path model.unconditional_lora_path
is not supported, FLUX attends to T5's padding as in BFL's own code: set it to false |
    model.attn_masking
is not supported, the blocks' linears alone are trained, each with A and B: take it out |
    network.all_layers network.transformer_only=true network.network_kwargs.use_bias
    network.network_kwargs.full_train_in_out network.network_kwargs.parameter_threshold
is not supported: network.dropout is the one dropout of the LoRA |
    network.network_kwargs.rank_dropout network.network_kwargs.module_dropout
is not supported, train.lr is the one learning rate: take it out |
    network.network_kwargs.layer_lr_multipliers network.network_kwargs.lr_multipliers
    network.network_kwargs.block_lr_multipliers train.do_paramiter_swapping
is not supported, a batch is of one size and run whole: take it out | train.single_item_batching
    train.auto_scale_batch_size
is not supported, steps are counted from 0: give the number of steps in train.steps alone |
    train.start_step
must be flowmatch: FLUX is trained by flow matching | train.noise_scheduler=flowmatch
must be 1000, as FLUX's timesteps are counted | train.num_train_timesteps=1000
is not supported, timesteps are drawn from the whole range: take it out; content_or_style favors one
    end | train.min_denoising_steps train.max_denoising_steps=999|1000
must be mse: the loss is flow matching's squared error | train.loss_type=mse
must be noise: the loss is flow matching's squared error | train.loss_target=noise
must be none: the loss is flow matching's squared error | train.frequency_loss_type=none
adds to the loss, which is flow matching's squared error alone: take it out | train.do_fft_loss
    train.fft_loss train.target_norm_std train.t0_loss_target train.max_loss
    train.latent_feature_extractor_path train.diffusion_feature_extractor_path
weights the loss by a signal-to-noise ratio, which flow matching does not have: take it out |
    train.min_snr_gamma train.snr_gamma train.learnable_snr_gos
needs a second prediction in each step, which is not made: take it out |
    train.diff_output_preservation train.blank_prompt_preservation train.do_prior_divergence
    train.do_guidance_loss train.do_differential_guidance train.do_blank_stabilization
    train.correct_pred_norm train.do_cfg train.do_random_cfg train.train_turbo
    train.adapter_assist_name_or_path
changes noise, latents or predictions, which are used as they are: take it out | train.noise_offset
    train.noise_multiplier=1 train.target_noise_multiplier=1 train.random_noise_multiplier
    train.random_noise_shift train.dynamic_noise_offset train.adaptive_scaling_factor
    train.match_noise_norm train.img_multiplier=1 train.latent_multiplier=1
    train.noisy_latent_multiplier=1 train.force_consistent_noise train.blended_blur_noise
    train.optimal_noise_pairing_samples=1 train.pred_scaler=1 train.standardize_images
    train.standardize_latents train.do_signal_correction_noise train.do_batch_noise_correction
    train.do_signal_amplification
is not supported: train a folder of its own without regularization, or take this one out |
    datasets.is_reg datasets.prior_reg
must be 1: every data set trains the LoRA at full strength; num_repeats weights it |
    datasets.network_weight=1 datasets.loss_multiplier=1
is not supported, a LoRA is trained on pictures and captions alone: take it out |
    datasets.control_path datasets.control_path_1 datasets.control_path_2 datasets.control_path_3
    datasets.control_from_same_folder datasets.controls datasets.inpaint_path
    datasets.unconditional_path datasets.clip_image_path datasets.clip_image_from_same_folder
    datasets.pair_folder datasets.pos_folder datasets.neg_folder datasets.num_frames=0|1
    datasets.auto_frame_count
is not supported: give folder_path | datasets.dataset_path
is not supported, pictures are resized by their bucket and cropped at the center: take it out |
    datasets.random_crop datasets.square_crop datasets.random_scale datasets.scale=1
    datasets.buckets=true datasets.poi datasets.standardize_images
is not supported, pictures are mirrored left to right only: put mirrored copies into the folder |
    datasets.flip_y
is not supported, pictures are not augmented: take it out | datasets.augmentations datasets.augments
is not supported, captions are trained as they are written: take it out, or write them so |
    datasets.token_dropout_rate datasets.use_short_captions datasets.random_triggers
    datasets.replacements train.short_and_long_captions train.prompt_saturation_chance
is not supported: give caption_dropout_rate, which drops the whole caption |
    train.prompt_dropout_prob
"""

# of no effect on what comes out: ai-toolkit does not read them for FLUX, or they belong to a key
# that is refused where it is on, or they say how ai-toolkit runs
_SILENT = """
performance_log_every torch_profiler log_dir sqlite_db_path monitoring lorm_extract_mode
lorm_extract_mode_param logging.use_ui_logger logging.project_name logging.run_name logging.verbose
save.save_format save.hf_repo_id save.hf_private save.record_low_start_step
save.sample_on_record_low save.max_record_low_saves_to_keep

network.conv network.conv_alpha network.lokr_full_rank network.lokr_factor network.old_lokr_format
network.layer_offloading network.split_multistage_loras network.save_magnitude_less_lora

model.dtype model.low_vram model.sequential_load model.low_vram_layer_streaming model.auto_memory
model.layer_offloading model.layer_offloading_transformer_percent
model.layer_offloading_text_encoder_percent
model.split_model_over_gpus model.split_model_other_module_param_count_scale model.compile
model.block_compile model.compile_mode model.compile_fullgraph model.compile_dynamic
model.cache_size_limit model.quantize_te model.qtype_te model.text_encoder_bits model.te_device
model.te_dtype model.vae_device model.vae_dtype model.only_if_contains model.ignore_if_contains
model.model_kwargs model.model_paths model.refiner_start_at model.latent_space_version
model.unet_sample_size model.experimental_xl model.use_text_encoder_1 model.use_text_encoder_2
model.in_context

train.gradient_checkpointing train.attention_backend train.xformers train.sdp
train.unet_lr train.text_encoder_lr train.embedding_lr train.adapter_lr
train.refiner_lr train.train_refiner train.switch_boundary_every train.weight_jitter train.free_u
train.reg_weight train.next_sample_timesteps train.negative_prompt train.max_negative_prompts
train.max_cfg_scale train.cfg_rescale train.unconditional_prompt train.guidance_loss_target
train.do_guidance_loss_cfg_zero train.differential_guidance_scale train.pseudo_huber_c
train.diff_output_preservation_multiplier train.diff_output_preservation_class
train.blank_prompt_preservation_multiplier train.blank_prompt_probability
train.inverted_mask_prior_multiplier
train.correct_pred_norm_multiplier train.target_norm_std_value train.latent_feature_loss_weight
train.diffusion_feature_extractor_weight train.do_fft_velocity_equiv_weight
train.t0_velocity_equiv_weight train.frequency_loss_weight train.frequency_loss_cutoff
train.frequency_loss_min_period train.frequency_loss_max_period train.frequency_loss_transition
train.frequency_loss_patch_size train.frequency_loss_activation_offload
train.signal_correction_noise_scale train.batch_noise_correction_scale
train.signal_amplification_strength train.adapter_assist_type train.match_adapter_assist
train.match_adapter_chance train.show_turbo_outputs train.paramiter_swapping_factor
train.merge_network_on_save_strength train.short_and_long_captions_encoder_split
train.audio_loss_multiplier train.max_loss_debug train.min_batch_size train.max_batch_size
train.batch_size_warmup_steps train.lr_scheduler_params.total_iters train.lr_scheduler_params.T_max
train.lr_scheduler_params.T_0 train.lr_scheduler_params.T_mult

datasets.type datasets.cache_latents datasets.cache_latents_to_disk
datasets.cache_clip_vision_to_disk datasets.load_image_when_caching_latents datasets.num_workers
datasets.persistent_workers datasets.prefetch_factor datasets.prefetch_steps
datasets.gpu_prefetch_batches datasets.fast_image_size datasets.enable_ar_bucket
datasets.shuffle_augmentations datasets.replay_transforms datasets.random_triggers_max
datasets.num_controls_from_same_folder datasets.control_transparent_color
datasets.full_size_control_images datasets.clip_image_augmentations
datasets.clip_image_shuffle_augmentations datasets.guidance_type datasets.extra_values
datasets.shrink_video_to_frames datasets.fps datasets.do_i2v datasets.do_t2v datasets.do_audio
datasets.audio_normalize datasets.audio_preserve_pitch datasets.debug

sample.neg sample.samples.neg sample.guidance_rescale sample.refiner_start_at sample.num_frames
sample.fps
sample.duration sample.extra_values sample.adapter_conditioning_scale
sample.samples.num_frames sample.samples.fps sample.samples.duration sample.samples.ctrl_idx
sample.samples.do_cfg_norm
"""

TABLE = KeyTable(_MAPPED, _IGNORED, _REFUSED, _NOTED, _COMBINED, _SILENT)

# ---------------------------------------------------------------- words of combined keys

# FLUX.1's names; ai-toolkit cuts off what follows a colon
ARCHITECTURES = ("flux", "flex1")

_EPS = {"eps": 1e-6}  # ai-toolkit's for the Adam family; the libraries' own is 1e-8
_NO_DECAY = {**_EPS, "weight_decay": 0.0}
_OWN_8_BIT = "read as bitsandbytes' 8-bit AdamW, ai-toolkit has an 8-bit Adam of its own"

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
    "adafactor": ("adafactor", {}, None),
}

# theirs -> (ours, warm-up steps by default)
SCHEDULES = {
    "constant": ("constant", 0),
    "constant_with_warmup": ("constant", 1000),
    "linear": ("linear", 0),
    "cosine": ("cosine", 0),
    "cosine_with_restarts": ("cosine", 0),  # its first period is the whole run
}

# theirs -> ours. Their `linear` has no weight, ours is their `linear_timesteps`; FLUX's scheduler
# has one shift, which the three names share.
TIMESTEPS = {
    "sigmoid": "sigmoid", "linear": "uniform", "weighted": "weighted", "flux_shift": "flux_shift",
    "shift": "flux_shift", "lumina2_shift": "flux_shift",
}  # fmt: skip

# settings behind -- in a prompt, theirs -> the key of a preview
FLAGS = {
    "n": "neg", "w": "width", "h": "height", "d": "seed", "seed": "seed", "l": "guidance_scale",
    "cfg": "guidance_scale", "s": "sample_steps", "steps": "sample_steps",
}  # fmt: skip
