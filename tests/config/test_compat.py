"""ai-toolkit's YAML: what each key becomes, the notes about it, what is refused."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors import safe_open

from fluxfast.config.ai_toolkit import convert_ai_toolkit, is_ai_toolkit
from fluxfast.config.ai_toolkit_keys import TABLE
from fluxfast.config.schema import Config, all_keys, build_config, load_config
from fluxfast.config.yaml_io import parse_yaml
from fluxfast.errors import ConfigError
from fluxfast.model.lora import select_targets
from fluxfast.model.spec import DEV

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "ai-toolkit"


def theirs(**changes) -> dict:
    """A short file of their form; `train__lr=1` sets train.lr, `datasets__…` the one data set,
    `sample__samples__…` one preview.
    """
    process = {
        "type": "sd_trainer",
        "network": {"type": "lora", "linear": 16},
        "datasets": [{"folder_path": "photos"}],
        "model": {"name_or_path": "m", "is_flux": True},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        node = process
        for section in sections:
            node = node.setdefault(section, [{}] if section == "samples" else {})
            node = node[0] if isinstance(node, list) else node
        node[last] = value
    return {"job": "extension", "config": {"name": "run", "process": [process]}}


def read(**changes) -> tuple[Config, list[str]]:
    native, notes = convert_ai_toolkit(theirs(**changes))
    return build_config(native), notes


def keys(notes: list[str]) -> list[str]:
    return [note.split(": ")[0] for note in notes]


def refused(raw: dict) -> ConfigError:
    """The error, after checking that it is one that a user can read."""
    with pytest.raises(ConfigError) as caught:
        build_config(convert_ai_toolkit(raw)[0])
    assert "\n" not in caught.value.message and "Traceback" not in str(caught.value)
    return caught.value


# ---------------------------------------------------------------- the stock files

STOCK = """
name: my_flux_lora
output_dir: output
device: cuda:0
model: {path: black-forest-labs/FLUX.1-dev, storage: auto, compute: bf16}
lora: {rank: 16, alpha: 16, targets: all}
data: {folder: examples/nano/photos, resolution: [512, 768, 1024], caption_dropout: 0.05,
  keep_tokens: 0}
train: {steps: 2000, batch_size: 1, gradient_accumulation: 1, lr: 0.0001, optimizer: adamw8bit,
  optimizer_args: {eps: 0.000001}, lr_schedule: constant, warmup_steps: 0, max_grad_norm: 1.0,
  timesteps: sigmoid, timestep_bias: balanced, guidance: 1.0, ema: {enabled: true, decay: 0.99}}
save: {every: 250, keep: 4, dtype: fp16}
sample: {every: 250, first: true, width: 1024, height: 1024, steps: 20, guidance: 4.0, seed: 42,
  walk_seed: true}
"""
STOCK_NOTES = {"model.quantize", "train.ema_config.use_ema"}


@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_the_stock_file_field_by_field(kind, log_lines):
    config = load_config(EXAMPLES / f"flux_{kind}_24gb.yaml")
    notes = [line.removeprefix("note: ") for line in log_lines]
    expected = yaml.safe_load(STOCK)
    expected["sample"]["prompts"] = config.sample.prompts
    if kind == "schnell":
        expected["name"] = "my_schnell_lora"
        expected["model"]["path"] = "black-forest-labs/FLUX.1-schnell"
        expected["sample"] |= {"steps": 4, "guidance": 1.0}
        expected["model"]["assistant_lora"] = "ostris/FLUX.1-schnell-training-adapter"
    assert config == build_config(expected)  # every field not named here is at its default
    assert len(config.sample.prompts) == 3
    assert sorted(keys(notes)) == sorted(STOCK_NOTES)
    assert all("\n" not in note and note.split(": ", 1)[1] for note in notes)


def test_what_a_file_leaves_out_takes_their_default():
    config, notes = read(network={"type": "lora"})
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (4, 4, "all")
    train = config.train
    assert (train.steps, train.lr, train.optimizer) == (1000, 1e-6, "adamw")
    assert (train.timesteps, config.memory.policy) == ("sigmoid", "auto")
    assert not train.ema.enabled
    assert (config.save.every, config.save.keep, config.save.dtype) == (1000, 5, "fp16")
    assert (config.model.compute, config.model.storage) == ("fp32", "fp32")
    entry = config.data[0]
    assert (entry.resolution, entry.caption_dropout, entry.keep_tokens) == ([512], 0.0, 0)
    assert notes == []


# ---------------------------------------------------------------- every documented key

EVERY = """
job: extension
config:
  name: all
  process:
    - type: ui_trainer
      training_folder: out
      device: cpu
      training_seed: 3
      trigger_word: ohwx
      network:
        {type: lora, linear: 8, linear_alpha: 4, dropout: 0.1, pretrained_lora_path: x,
         network_kwargs: {only_if_contains: [attn], ignore_if_contains: norm}}
      save: {dtype: bf16, save_every: 5, max_step_saves_to_keep: 2}
      datasets:
        - {folder_path: a, caption_ext: txt, caption_type: caption, caption_dropout_rate: 0.5,
           shuffle_tokens: true, keep_tokens: 2, batch_size: 3, resolution: 768, num_repeats: 3,
           flip_x: true, mask_path: masks, invert_mask: false, mask_min_value: 0.2,
           default_caption: a photograph}
        - {folder_path: b, alpha_mask: true}
      train:
        {batch_size: 2, steps: 100, gradient_accumulation_steps: 4, gradient_accumulation: 1,
         train_unet: true, timestep_type: shift, linear_timesteps: false,
         linear_timesteps2: false, content_or_style: style, optimizer: prodigy8bit, lr: 1e-4,
         optimizer_params: {weight_decay: 0.01}, lr_scheduler: cosine,
         lr_scheduler_params: {num_warmup_steps: 40, eta_min: 0}, max_grad_norm: 0.5,
         skip_first_sample: true, disable_sampling: false,
         ema_config: {use_ema: true, ema_decay: 0.9}, dtype: fp16, cfg_scale: 2.0}
      model: {name_or_path: m, arch: flux, is_flux: true, quantize: true, assistant_lora_path: x,
              extras_name_or_path: parts}
      sample:
        {sample_every: 50, width: 512, height: 640,
         samples: [{prompt: "[trigger] runs --w 768", seed: 1, width: 256, height: 256,
                    guidance_scale: 2, sample_steps: 5}, {prompt: a cat}],
         seed: 7, walk_seed: true, guidance_scale: 3, sample_steps: 10}
      logging: {log_every: 5}
meta: {name: "[name]"}
"""
EVERY_NOTES = """
trigger_word network.linear_alpha datasets[0].shuffle_tokens datasets[0].flip_x
datasets[0].keep_tokens
train.gradient_accumulation_steps train.optimizer train.lr train.ema_config.use_ema train.dtype
model.quantize
"""
NATIVE = """
name: all
output_dir: out
device: cpu
seed: 3
trigger: ohwx
log_every: 5
model: {path: m, encoders: parts, storage: auto, compute: bf16, assistant_lora: x}
lora: {rank: 8, alpha: 8, dropout: 0.1, targets: all, include: [attn], exclude: [norm],
  init_from: x}
data:
  - {folder: a, caption_ext: .caption, caption_dropout: 0.5, shuffle_captions: true, keep_tokens: 1,
     resolution: 768, batch_size: 3, num_repeats: 6, flip: true, mask: folder, mask_folder: masks,
     mask_min: 0.2, default_caption: a photograph}
  - {folder: b, mask: alpha, resolution: 512, caption_dropout: 0.0, keep_tokens: 0}
train: {steps: 25, batch_size: 2, gradient_accumulation: 4, lr: 1.0, optimizer: prodigy,
  optimizer_args: {eps: 0.000001, weight_decay: 0.01}, lr_schedule: cosine, warmup_steps: 10,
  max_grad_norm: 0.5, timesteps: flux_shift, timestep_bias: style, guidance: 2.0,
  ema: {enabled: true, decay: 0.9}}
save: {every: 2, keep: 2, dtype: bf16}
sample: {samples: [{prompt: "[trigger] runs", width: 768, height: 256, seed: 1, steps: 5,
  guidance: 2}, {prompt: a cat}], every: 13, first: false, width: 512, height: 640, steps: 10,
  guidance: 3, seed: 7, walk_seed: true}
"""


def test_every_mapped_key():
    """One note for each key that is read differently, none for any other."""
    native, notes = convert_ai_toolkit(parse_yaml(EVERY))
    assert sorted(keys(notes)) == sorted(EVERY_NOTES.split())
    assert build_config(native) == build_config(yaml.safe_load(NATIVE))
    (process,) = parse_yaml(EVERY)["config"]["process"]
    process["datasets"] = process["datasets"][0]
    process["sample"]["samples"] = process["sample"]["samples"][0]
    assert all(exists(process, key.split(".")) for key in TABLE.mapped)


def exists(node: dict, path: list[str]) -> bool:
    return path[0] in node and (len(path) == 1 or exists(node[path[0]], path[1:]))


def test_what_changes_nothing_is_not_mentioned():
    preview = {"sample__samples__prompt": "a cat"}
    for key in TABLE.silent:
        for value in (True, 2, "x", ["x"], {"x": 1}):
            assert read(**preview, **{key.replace(".", "__"): value}) == read(**preview), key


def test_values_that_ask_for_nothing_are_not_mentioned():
    for key, (_, quiet) in (TABLE.ignored | TABLE.refused).items():
        for value in quiet:
            assert read(**{key.replace(".", "__"): value})[1] == [], key


def test_every_native_key_of_the_table_is_a_setting():
    assert {row.native for row in TABLE.mapped.values()} <= all_keys(Config)


# ---------------------------------------------------------------- the corpus: every key of theirs

# kind | off -> on | keys: those of ai-toolkit's own classes and what its interface writes
# (toolkit/config_modules.py, jobs/process/BaseSDTrainProcess.py, ui/src/types.ts). off: what they
# write where nothing is asked for; on: a value that asks for something. done: the settings change;
# read: likewise, with a note; noted: only a note; idle: neither; refused.
CORPUS = """
done    | output -> elsewhere | training_folder
done    | cuda -> cpu | device
done    | 42 -> 3 | training_seed
read    | null -> ohwx | trigger_word datasets.trigger_word
idle    | sd_trainer -> ui_trainer | type
refused | null -> {type: ip} | adapter embedding decorator guidance slider fizgig_slider flow_dpo
refused | null -> {type: ip} | network.lorm
refused | false -> true | do_lorm
noted   | null -> {validation_items: []} | validation_config train.validation_config
noted   | null -> {width: 64} | first_sample

idle    | lora -> locon | network.type
read    | 16 -> 8 | network.rank
done    | 16 -> 32 | network.linear
noted   | 16 -> 8 | network.linear_alpha network.alpha
done    | null -> 0.1 | network.dropout
done    | null -> x.safetensors | network.pretrained_lora_path
done    | [] -> [attn] | network.network_kwargs.only_if_contains
done    | [] -> [attn] | network.network_kwargs.ignore_if_contains
refused | 0 -> 0.1 | network.network_kwargs.rank_dropout network.network_kwargs.module_dropout
refused | 0 -> 0.1 | network.network_kwargs.parameter_threshold
refused | false -> true | network.network_kwargs.use_bias network.network_kwargs.full_train_in_out
refused | {} -> {attn: 0.5} | network.network_kwargs.layer_lr_multipliers
refused | {} -> {attn: 0.5} | network.network_kwargs.lr_multipliers
refused | {} -> {attn: 0.5} | network.network_kwargs.block_lr_multipliers
refused | true -> false | network.transformer_only
refused | false -> true | network.all_layers

done    | float16 -> bf16 | save.dtype
done    | 1000 -> 250 | save.save_every
done    | 5 -> 4 | save.max_step_saves_to_keep
noted   | false -> true | save.push_to_hub
noted   | 0 -> 100 | save.record_low_window_size

done    | 10 -> 1 | logging.log_every
noted   | false -> true | logging.use_wandb

done    | photos -> others | datasets.folder_path
refused | null -> photos | datasets.dataset_path
done    | null -> a cat | datasets.default_caption
done    | .txt -> json | datasets.caption_ext datasets.caption_type
done    | 0 -> 0.05 | datasets.caption_dropout_rate
done    | 512 -> [512, 768] | datasets.resolution
done    | 1 -> 10 | datasets.num_repeats
read    | false -> true | datasets.shuffle_tokens datasets.flip_x
done    | 0 -> 2 | datasets.keep_tokens
done    | false -> true | datasets.alpha_mask
done    | null -> masks | datasets.mask_path
idle    | false -> true | datasets.invert_mask
done    | 0 -> 0.1 | datasets.mask_min_value
done    | 1 -> 4 | datasets.batch_size
refused | false -> true | datasets.is_reg datasets.prior_reg datasets.flip_y datasets.random_crop
refused | false -> true | datasets.random_scale datasets.square_crop datasets.standardize_images
refused | true -> false | datasets.buckets
refused | 1.0 -> 0.5 | datasets.scale datasets.network_weight datasets.loss_multiplier
refused | 1.0 -> -1.0 | datasets.network_weight
refused | null -> face | datasets.poi
refused | [] -> [ColorJitter] | datasets.augments
refused | null -> [{method: Blur}] | datasets.augmentations
refused | 0.0 -> 0.1 | datasets.token_dropout_rate
refused | false -> true | datasets.use_short_captions
refused | [] -> [a, b] | datasets.random_triggers
refused | [] -> ["a|b"] | datasets.replacements
refused | null -> ctrl | datasets.control_path datasets.control_path_1 datasets.control_path_2
refused | null -> ctrl | datasets.control_path_3 datasets.inpaint_path datasets.unconditional_path
refused | null -> ctrl | datasets.clip_image_path datasets.pair_folder datasets.pos_folder
refused | null -> ctrl | datasets.neg_folder
refused | "" -> [a, b] | datasets.control_path
refused | false -> true | datasets.control_from_same_folder datasets.clip_image_from_same_folder
refused | [] -> [depth] | datasets.controls
refused | 1 -> 41 | datasets.num_frames
refused | false -> true | datasets.auto_frame_count
noted   | 64 -> 16 | datasets.bucket_tolerance
idle    | false -> true | datasets.cache_text_embeddings

done    | 1 -> 2 | train.batch_size train.gradient_accumulation
read    | 1 -> 2 | train.gradient_accumulation_steps
done    | 1000 -> 2000 | train.steps
done    | 1e-6 -> 1e-4 | train.lr
done    | adamw -> prodigyopt | train.optimizer
refused | adamw -> lion8bit | train.optimizer
refused | adamw -> dadaptation | train.optimizer
refused | adamw -> automagic | train.optimizer
done    | {} -> {weight_decay: 1e-4} | train.optimizer_params
done    | constant -> cosine | train.lr_scheduler
refused | constant -> step | train.lr_scheduler
refused | constant -> linear | train.lr_scheduler
done    | {} -> {num_warmup_steps: 5} | train.lr_scheduler_params
done    | 0 -> 5 | train.lr_scheduler_params.num_warmup_steps train.lr_scheduler_params.warmup_steps
idle    | 0 -> 1e-6 | train.lr_scheduler_params.eta_min
done    | 1 -> 0.5 | train.lr_scheduler_params.factor
idle    | 1 -> 0.5 | train.lr_scheduler_params.start_factor train.lr_scheduler_params.end_factor
done    | fp32 -> bf16 | train.dtype
done    | 1.0 -> 0.5 | train.max_grad_norm
refused | flowmatch -> ddpm | train.noise_scheduler
done    | sigmoid -> weighted | train.timestep_type
refused | sigmoid -> lognorm_blend | train.timestep_type
refused | sigmoid -> one_step | train.timestep_type
done    | false -> true | train.linear_timesteps train.linear_timesteps2
done    | false -> true | train.bypass_guidance_embedding
done    | balanced -> style | train.content_or_style
done    | 1.0 -> 3.5 | train.cfg_scale
read    | {use_ema: false} -> {use_ema: true} | train.ema_config
read    | false -> true | train.ema_config.use_ema
idle    | 0.99 -> 0.9 | train.ema_config.ema_decay
idle    | false -> true | train.ema_config.use_feedback
idle    | 1.0 -> 1.1 | train.ema_config.param_multiplier
refused | true -> false | train.train_unet
refused | false -> true | train.train_text_encoder train.unload_text_encoder
refused | 0 -> 1 | train.start_step
refused | 0 -> 200 | train.min_denoising_steps
refused | 999 -> 800 | train.max_denoising_steps
refused | 1000 -> 500 | train.num_train_timesteps
refused | mse -> mae | train.loss_type
refused | mse -> wavelet | train.loss_type
refused | noise -> source | train.loss_target
refused | none -> low_pass | train.frequency_loss_type
refused | null -> 5.0 | train.min_snr_gamma train.snr_gamma train.max_loss
refused | false -> true | train.learnable_snr_gos train.do_fft_loss train.fft_loss
refused | false -> true | train.t0_loss_target
refused | null -> 1.0 | train.target_norm_std
refused | null -> dfe | train.latent_feature_extractor_path train.diffusion_feature_extractor_path
refused | null -> t2i | train.adapter_assist_name_or_path
refused | false -> true | train.diff_output_preservation train.blank_prompt_preservation
refused | false -> true | train.do_prior_divergence train.do_guidance_loss
refused | false -> true | train.do_differential_guidance train.do_blank_stabilization
refused | false -> true | train.correct_pred_norm train.do_cfg train.do_random_cfg
refused | false -> true | train.train_turbo train.single_item_batching train.auto_scale_batch_size
refused | false -> true | train.do_paramiter_swapping train.dynamic_noise_offset
refused | false -> true | train.adaptive_scaling_factor train.match_noise_norm
refused | false -> true | train.force_consistent_noise train.blended_blur_noise
refused | false -> true | train.standardize_images train.standardize_latents
refused | false -> true | train.do_signal_correction_noise train.do_batch_noise_correction
refused | false -> true | train.do_signal_amplification
refused | 0.0 -> 0.0357 | train.noise_offset train.random_noise_multiplier train.random_noise_shift
refused | 1.0 -> 0.9 | train.noise_multiplier train.target_noise_multiplier train.img_multiplier
refused | 1.0 -> 0.9 | train.latent_multiplier train.noisy_latent_multiplier train.pred_scaler
refused | 1 -> 4 | train.optimal_noise_pairing_samples
refused | false -> true | train.short_and_long_captions
refused | 0.0 -> 0.1 | train.prompt_saturation_chance train.prompt_dropout_prob
idle    | false -> true | train.inverted_mask_prior
noted   | false -> true | train.merge_network_on_save train.force_first_sample
done    | false -> true | train.skip_first_sample
idle    | false -> true | train.disable_sampling
idle    | false -> true | train.cache_text_embeddings

done    | m -> other | model.name_or_path
done    | null -> parts | model.extras_name_or_path
done    | null -> x | model.assistant_lora_path
idle    | flux -> flex1 | model.arch
idle    | flux -> "flux:tag" | model.arch
refused | flux -> flex2 | model.arch
refused | flux -> flux_kontext | model.arch
refused | true -> false | model.is_flux
refused | false -> true | model.is_xl model.is_v2 model.is_v3 model.is_pixart model.is_pixart_sigma
refused | false -> true | model.is_auraflow model.is_lumina2 model.is_ssd model.is_vega
refused | false -> true | model.is_v_pred model.attn_masking
read    | false -> true | model.quantize model.use_flux_cfg
idle    | qfloat8 -> uint4 | model.qtype
idle    | {} -> {exclude: [x]} | model.quantize_kwargs
idle    | null -> x | model.accuracy_recovery_adapter
refused | null -> x | model.unet_path model.refiner_name_or_path model.vae_path
refused | null -> x | model.te_name_or_path model.text_encoder_path model.lora_path
refused | null -> x | model.unconditional_lora_path
done    | null -> x | model.inference_lora_path

done    | 100 -> 250 | sample.sample_every
done    | 512 -> 1024 | sample.width sample.height
done    | 0 -> 42 | sample.seed
done    | false -> true | sample.walk_seed
done    | 7.0 -> 4 | sample.guidance_scale
done    | 20 -> 25 | sample.sample_steps
done    | [] -> [a cat] | sample.prompts
done    | [] -> [{prompt: a cat}] | sample.samples
done    | a -> b | sample.samples.prompt
done    | null -> 768 | sample.samples.width sample.samples.height
done    | null -> 5 | sample.samples.seed sample.samples.guidance_scale sample.samples.sample_steps
noted   | 1.0 -> 0.5 | sample.network_multiplier sample.samples.network_multiplier
noted   | null -> x.png | sample.samples.ctrl_img sample.samples.ctrl_img_1
noted   | null -> x.png | sample.samples.ctrl_img_2 sample.samples.ctrl_img_3
noted   | flowmatch -> ddpm | sample.sampler
noted   | 0 -> 500 | sample.sample_start_step
noted   | jpg -> webp | sample.format
noted   | null -> {enabled: true} | sample.comfy
"""


def rows() -> list:
    """(kind, off, on, key) of every line and key."""
    cases = []
    for line in filter(None, CORPUS.split("\n")):
        kind, pair, each = map(str.strip, line.split(" | "))
        off, on = map(yaml.safe_load, pair.split(" -> "))
        cases += [(kind, off, on, key) for key in each.split()]
    return cases


def test_every_key_of_theirs_is_done_refused_or_noted_and_its_off_value_silent():
    found = {}
    for kind, off, on, key in rows():
        place = key.replace(".", "__")
        off_config, off_notes = read(**{place: off})
        assert off_notes == [], (key, off, off_notes)
        try:
            config, notes = read(**{place: on})
        except ConfigError as error:
            where = error.message.split(" ")[0]
            assert where.endswith(key.rpartition(".")[2]), (key, error.message)
            got = "refused"
        else:
            changed = config != off_config
            assert len(notes) <= 1, notes
            got = ("idle", "noted", "done", "read")[2 * changed + len(notes)]
        found[key, str(on)] = kind, got
    assert {key: pair for key, pair in found.items() if len(set(pair)) > 1} == {}
    outside = {"datasets", "train.ema_config"}  # these are read through the keys below them
    assert {key for _, _, _, key in rows()} ^ (TABLE.known - TABLE.silent) <= outside


# ---------------------------------------------------------------- meaning, group by group


def test_alpha_is_the_rank_whatever_is_written():
    """ai-toolkit's peft form of FLUX has no alpha: it sets it to the rank."""
    config, notes = read(network__linear=32, network__linear_alpha=8)
    assert (config.lora.rank, config.lora.alpha) == (32, 32)
    (note,) = notes
    assert note.startswith("network.linear_alpha: ") and "--set lora.alpha=8 takes 8 / 32" in note
    assert read(network__linear=32, network__linear_alpha=32)[1] == []
    assert read(network__linear_alpha=1, network__rank=8)[0].lora.rank == 8


@pytest.mark.parametrize(
    "changes, kind, noted",
    [
        ({}, "sigmoid", []),
        ({"timestep_type": "linear"}, "uniform", []),
        ({"linear_timesteps": True}, "linear", []),
        ({"timestep_type": "linear", "linear_timesteps": True}, "linear", []),
        ({"timestep_type": "Weighted"}, "weighted", []),
        ({"timestep_type": "weighted", "linear_timesteps": True}, "weighted", []),
        ({"timestep_type": "weighted", "linear_timesteps2": True}, "weighted", []),
        ({"linear_timesteps2": True}, "linear2", []),
        ({"linear_timesteps": True, "linear_timesteps2": True}, "linear2", []),
        ({"timestep_type": "flux_shift"}, "flux_shift", []),
        ({"timestep_type": "lumina2_shift"}, "flux_shift", []),
        ({"timestep_type": "shift", "linear_timesteps": True}, "linear", ["train.timestep_type"]),
    ],
)
def test_timesteps(changes, kind, noted):
    config, notes = read(train=changes)
    assert config.train.timesteps == kind and keys(notes) == noted


@pytest.mark.parametrize(
    "changes, expected, noted",
    [
        ({"optimizer": "AdamW", "lr": "1e-4"}, ("adamw", 1e-4, {"eps": 1e-6}), []),
        ({"optimizer": "adam"}, ("adamw", 1e-6, {"eps": 1e-6, "weight_decay": 0.0}), []),
        (
            {"optimizer": "adamw8bit", "optimizer_params": {"weight_decay": 0.1, "eps": 1e-8}},
            ("adamw8bit", 1e-6, {"eps": 1e-8, "weight_decay": 0.1}),
            [],
        ),
        ({"optimizer": "Prodigyopt", "lr": 1.0}, ("prodigy", 1.0, {"eps": 1e-6}), []),
        (
            {"optimizer": "prodigy8bit_x", "lr": 1.0},
            ("prodigy", 1.0, {"eps": 1e-6}),
            ["train.optimizer"],
        ),
        ({"optimizer": "prodigy", "lr": 1.0}, ("prodigy", 1.0, {"eps": 1e-6}), []),
        ({"optimizer": "prodigy", "lr": 1e-4}, ("prodigy", 1.0, {"eps": 1e-6}), ["train.lr"]),
        ({"optimizer": "adafactor", "lr": 1e-3}, ("adafactor", 1e-3, {}), []),
    ],
)
def test_optimizers(changes, expected, noted):
    config, notes = read(train=changes)
    train = config.train
    assert (train.optimizer, train.lr, train.optimizer_args) == expected
    assert keys(notes) == noted
    assert train.max_grad_norm == (None if train.optimizer == "adafactor" else 1.0)


@pytest.mark.parametrize(
    "kind, params, expected",
    [
        ("constant", {}, ("constant", 0, 1e-4, 0)),
        ("constant", {"factor": 0.5}, ("constant", 0, 5e-5, 0)),
        ("constant_with_warmup", {}, ("constant", 1000, 1e-4, 0)),
        ("constant_with_warmup", {"num_warmup_steps": 50}, ("constant", 50, 1e-4, 0)),
        ("linear", {"start_factor": 1.0, "end_factor": 0.0}, ("linear", 0, 1e-4, 0)),
        ("linear", {"start_factor": 1, "end_factor": 0.5}, ("linear", 0, 1e-4, 5e-5)),
        ("linear", {"start_factor": 1}, ("linear", 0, 1e-4, 1e-4)),
        ("cosine", {"num_warmup_steps": 9}, ("cosine", 9, 1e-4, 0)),
        ("cosine", {"warmup_steps": 9, "T_mult": 2}, ("cosine", 9, 1e-4, 0)),
        ("cosine", {"eta_min": "1e-6"}, ("cosine", 0, 1e-4, 1e-6)),
        ("cosine_with_restarts", {"x": 2}, ("cosine", 0, 1e-4, 0)),
    ],
)
def test_schedules(kind, params, expected):
    settings = {"lr": 1e-4, "lr_scheduler": kind, "lr_scheduler_params": params}
    config, notes = read(train=settings)
    train = config.train
    assert (train.lr_schedule, train.warmup_steps, train.lr, train.lr_end) == expected
    assert keys(notes) == [f"train.lr_scheduler_params.{key}" for key in params if key == "x"]


def test_accumulation_of_both_kinds():
    config, notes = read(train__gradient_accumulation=4, train__steps=100)
    assert (config.train.gradient_accumulation, config.train.steps) == (4, 100) and notes == []
    config, notes = read(
        train__gradient_accumulation_steps=4, train__steps=100, save__save_every=30
    )
    assert (config.train.gradient_accumulation, config.train.steps) == (4, 25)
    assert config.save.every == 8
    assert keys(notes) == ["train.gradient_accumulation_steps"] and "discards" in notes[0]


@pytest.mark.parametrize(
    "dtype, quantize, storage, compute, noted",
    [
        ("bf16", True, "auto", "bf16", ["model.quantize"]),
        ("bfloat16", False, "bf16", "bf16", []),
        ("float32", False, "fp32", "fp32", []),
        ("float16", False, "bf16", "bf16", ["train.dtype"]),
    ],
)
def test_precision(dtype, quantize, storage, compute, noted):
    config, notes = read(train__dtype=dtype, model__quantize=quantize)
    assert (config.model.storage, config.model.compute) == (storage, compute)
    assert keys(notes) == noted


def test_sampling_can_be_off():
    changes = {"sample__prompts": ["a", "b --x"]}
    assert read(**changes)[0].sample.prompts == ["a", "b"]
    config, notes = read(**changes, train__disable_sampling=True)
    assert config.sample.prompts == [] and notes == []
    assert not read(**changes, train__skip_first_sample=True)[0].sample.first


def test_trigger_in_prompts():
    prompts = ["[trigger] runs", "a [name] --w 512 --m 0.5"]
    config, notes = read(sample__prompts=prompts, trigger_word="ohwx")
    assert config.trigger == "ohwx"
    assert [(each.prompt, each.width) for each in config.sample.samples] == [
        ("[trigger] runs", None),
        ("a run", 512),
    ]
    assert sorted(keys(notes)) == ["sample.prompts", "trigger_word"]
    assert "--m is cut off" in notes[-1]
    config, notes = read(sample__prompts=prompts[:1])
    assert config.sample.prompts == ["runs"]
    assert keys(notes) == ["sample.prompts"]


def test_settings_of_one_preview():
    items = [
        {"prompt": "a cat --seed 3 --cfg 3.5", "seed": 9, "neg": "ugly"},
        {"prompt": "a dog", "seed": -1},
    ]
    config, notes = read(sample__samples=items)
    cat, dog = config.sample.samples
    assert (cat.prompt, cat.seed, cat.guidance, cat.width) == ("a cat", 3, 3.5, None)
    assert (dog.prompt, dog.seed) == ("a dog", -1) and notes == []
    assert "sample.prompts[0]: --w takes" in refused(theirs(sample__prompts=["x --w wide"])).message


def test_true_cfg_and_speed_loras_of_previews():
    items = [{"prompt": "a cat --n dogs", "guidance_scale": 2}, {"prompt": "a dog"}]
    config, _ = read(
        model__use_flux_cfg=True,
        model__inference_lora_path="few/steps",
        sample__samples=items,
        sample__neg="ugly",
        sample__guidance_scale=3,
    )
    drawn = [(each.cfg, each.negative, each.loras[0].file) for each in config.sample.all_drawn()]
    assert drawn == [(2, "dogs", "few/steps"), (3, "ugly", "few/steps")]
    assert not read(sample__samples=items, sample__neg="ugly")[0].sample.drawn(0).negative


@pytest.mark.parametrize(
    "run, own, trigger, triggers",
    [
        (None, ["alice"], "alice", [None]),
        (None, ["alice", "alice"], "alice", [None, None]),
        (None, ["alice", "bob"], None, ["alice", "bob"]),
        (None, ["alice", None], None, ["alice", None]),
        ("ohwx", ["alice", None], "ohwx", ["alice", None]),
        ("ohwx", ["ohwx", ""], "ohwx", [None, None]),
        (None, [None, None], None, [None, None]),
    ],
)
def test_triggers_of_data_sets(run, own, trigger, triggers):
    entries = [{"folder_path": "a", "trigger_word": word} for word in own]
    config, notes = read(trigger_word=run, datasets=entries)
    assert (config.trigger, [entry.trigger for entry in config.data]) == (trigger, triggers)
    assert [key.rpartition(".")[2] for key in keys(notes)] == ["trigger_word"] * bool(
        config.triggers
    )


def test_what_depends_on_another_key():
    """What is asked for in vain changes nothing, and is refused where it would."""
    ema = {"use_ema": True, "param_multiplier": 1.01}
    assert "ema_config.param_multiplier moves" in refused(theirs(train__ema_config=ema)).message
    masks = {"datasets__mask_path": "masks"}
    assert "invert_mask" in refused(theirs(**masks, datasets__invert_mask=True)).message
    prior = theirs(**masks, train__inverted_mask_prior=True)
    assert "inverted_mask_prior needs a second prediction" in refused(prior).message
    notes = read(model__quantize=True, model__qtype="uint4|some/adapter")[1]
    assert keys(notes) == ["model.quantize", "model.qtype"]
    decay = {"weight_decay": 1e-4}
    raw = theirs(train__optimizer="adam8bit", train__optimizer_params=decay)
    assert "take adamw8bit, where it acts on the weights" in refused(raw).message
    unloaded = {"train__unload_text_encoder": True}
    assert read(**unloaded, train__cache_text_embeddings=True)[1] == []
    assert read(**unloaded, datasets__cache_text_embeddings=True)[1] == []


def test_no_caption_is_dropped_where_they_cache_text_embeddings():
    """Their data loader drops none then, whatever is written: their interface writes 0.05."""
    entries = [{"folder_path": name, "caption_dropout_rate": 0.05} for name in "ab"]
    config, notes = read(datasets=entries, train__cache_text_embeddings=True)
    assert [entry.caption_dropout for entry in config.data] == [0, 0]
    off = "off, as in ai-toolkit where text embeddings are cached"
    assert notes == [f"datasets[0].caption_dropout_rate and 1 more: {off}"]
    entries[1]["cache_text_embeddings"] = True
    config, notes = read(datasets=entries)
    assert [entry.caption_dropout for entry in config.data] == [0.05, 0]
    assert notes == [f"datasets[1].caption_dropout_rate: {off}"]


@pytest.mark.parametrize("word", ["mlp", "proj", "linear", "attn", "transformer.single_transf"])
def test_layers_are_sought_in_the_names_that_they_seek_in(word):
    """`mlp` is a part of proj_mlp there, not of BFL's img_mlp."""
    names = [f"transformer.{target.diffusers}" for target in select_targets(DEV, "all")]
    expected = {name for name in names if word in name}
    for key, chosen in (("only", expected), ("ignore", set(names) - expected)):
        lora = read(**{f"network__network_kwargs__{key}_if_contains": word})[0].lora
        found = select_targets(DEV, lora.targets, lora.include, lora.exclude)
        assert {f"transformer.{target.diffusers}" for target in found} == chosen


def test_guidance_is_left_out_where_they_bypass_it():
    """Flex.1, of which their interface's stock job is one."""
    changes = {"model__arch": "flex1", "train__bypass_guidance_embedding": True}
    assert read(**changes)[0].train.guidance is None
    assert read(model__use_flux_cfg=True, train__cfg_scale=2.0)[0].train.guidance is None


UI_JOB = """
{"job": "extension", "config": {"name": "ui", "process": [{"type": "diffusion_trainer",
"training_folder": "output", "sqlite_db_path": "./aitk_db.db", "device": "cuda",
"trigger_word": null, "performance_log_every": 10, "network": {"type": "lora", "linear": 32,
"linear_alpha": 32, "conv": 16, "conv_alpha": 16, "lokr_full_rank": true, "lokr_factor": -1,
"network_kwargs": {"ignore_if_contains": []}}, "save": {"dtype": "bf16", "save_every": 250,
"max_step_saves_to_keep": 4, "save_format": "diffusers", "push_to_hub": false}, "datasets":
[{"folder_path": "pics", "mask_path": null, "mask_min_value": 0.1, "default_caption": "",
"caption_ext": "txt", "caption_dropout_rate": 0.05, "cache_latents_to_disk": false, "is_reg": false,
"network_weight": 1, "resolution": [512], "controls": [], "shrink_video_to_frames": true,
"num_frames": 1, "do_i2v": true, "flip_x": false, "flip_y": false, "num_repeats": 1,
"control_path_1": null, "control_path": null}], "train": {"batch_size": 1,
"bypass_guidance_embedding": false, "steps": 3000, "gradient_accumulation": 1, "train_unet": true,
"train_text_encoder": false, "gradient_checkpointing": true, "noise_scheduler": "flowmatch",
"optimizer": "adamw8bit", "timestep_type": "sigmoid", "content_or_style": "balanced",
"optimizer_params": {"weight_decay": 0.0001}, "unload_text_encoder": false,
"cache_text_embeddings": false, "lr": 0.0001, "ema_config": {"use_ema": false, "ema_decay": 0.99},
"skip_first_sample": false, "force_first_sample": false, "disable_sampling": false,
"dtype": "bf16", "diff_output_preservation": false, "diff_output_preservation_multiplier": 1.0,
"diff_output_preservation_class": "person", "switch_boundary_every": 1, "loss_type": "mse"},
"logging": {"log_every": 1, "use_ui_logger": true}, "model": {"name_or_path": "m",
"quantize": false, "qtype": "qfloat8", "quantize_te": true, "qtype_te": "qfloat8", "arch": "flux",
"low_vram": false, "model_kwargs": {}, "compile": false, "layer_offloading": false,
"layer_offloading_transformer_percent": 1, "layer_offloading_text_encoder_percent": 1},
"sample": {"sampler": "flowmatch", "sample_every": 250, "width": 1024, "height": 1024,
"samples": [{"prompt": "a cat"}, {"prompt": "a dog", "seed": 7, "width": 512}], "neg": "",
"seed": 42, "walk_seed": true, "guidance_scale": 4, "sample_steps": 25, "num_frames": 1, "fps": 1}
}]}, "meta": {"name": "[name]", "version": "1.0"}}
"""


def test_a_job_of_their_interface_needs_no_note():
    """It holds every default, of which none means anything else here."""
    native, notes = convert_ai_toolkit(json.loads(UI_JOB))
    assert notes == []
    config = build_config(native)
    assert (config.lora.rank, config.lora.alpha, config.train.steps) == (32, 32, 3000)
    assert [each.width for each in config.sample.samples] == [None, 512]


def test_name_and_environment_are_put_in(monkeypatch):
    monkeypatch.setenv("PICTURES", "/data")
    config, _ = read(datasets__folder_path="${PICTURES}/[name]")
    assert config.data[0].folder == Path("/data/run")
    monkeypatch.delenv("PICTURES")
    assert "PICTURES is not set" in refused(theirs(datasets__folder_path="${PICTURES}/x")).message


def test_conversion_changes_nothing_of_the_file():
    raw = parse_yaml(EVERY)
    before = copy.deepcopy(raw)
    native, _ = convert_ai_toolkit(raw)
    native["data"][1]["resolution"].append(1)
    assert raw == before
    assert read()[0].data[0].resolution == [512]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "changes, note",
    [
        ({"train__stesp": 5}, "train.stesp: unknown, ignored; did you mean train.steps?"),
        ({"network__liner": 5}, "network.liner: unknown, ignored; did you mean network.linear?"),
        ({"lr": 1}, "lr: unknown, ignored; did you mean train.lr?"),
        ({"train__width": 1}, "train.width: unknown, ignored; did you mean sample.width?"),
        (
            {"datasets__capton_ext": "txt"},
            "datasets[0].capton_ext: unknown, ignored; did you mean datasets.caption_ext?",
        ),
        ({"zzz": {"a": 1}}, "zzz: unknown, ignored"),
    ],
)
def test_an_unknown_key_is_noted_with_the_nearest(changes, note):
    assert read(**changes)[1] == [note]


def test_unknown_keys_outside_the_process():
    raw = theirs() | {"version": 2}
    raw["config"]["extra"] = 1
    assert keys(convert_ai_toolkit(raw)[1]) == ["config.extra", "version"]


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"train__steps": "many"}, "train.steps takes a whole number, got 'many'"),
        ({"train__steps": 1.5}, "train.steps takes a whole number, got 1.5"),
        ({"train__steps": float("inf")}, "train.steps"),
        ({"train__steps": True}, "train.steps takes a whole number, got True"),
        ({"train__steps": 0}, "train.steps"),
        ({"train__lr": [1]}, "train.lr takes a number"),
        ({"train__lr": -1}, "train.lr"),
        ({"sample__walk_seed": "yes please"}, "takes true or false"),
        ({"train__optimizer": 8}, "train.optimizer takes one of adamw, adam, "),
        ({"train__optimizer_params": [1]}, "train.optimizer_params takes a mapping"),
        ({"train__lr_scheduler_params": {"num_warmup_steps": "x"}}, "num_warmup_steps takes"),
        ({"train__lr_scheduler": "linear"}, "set lr_scheduler_params: {start_factor: 1"),
        ({"train__gradient_accumulation_steps": -1}, "-1 is not supported"),
        ({"train__gradient_accumulation_steps": 2, "train__gradient_accumulation": 2}, "exclude"),
        ({"train": 5}, "train takes a mapping of settings, got 5"),
        ({"network": None}, "network is missing"),
        ({"network__type": "lokr"}, "network.type takes one of lora, locon, got 'lokr'"),
        ({"network__linear": "x"}, "network.linear takes a whole number"),
        ({"network__linear": 0}, "lora.rank"),
        ({"model": {"is_flux": True}}, "model.path is missing"),
        ({"model__arch": "sdxl"}, "is not text-to-image FLUX.1"),
        ({"model__name_or_path": 5}, "model.name_or_path takes text, got 5"),
        ({"datasets": None}, "datasets takes a list of mappings, got None"),
        ({"datasets": {"folder_path": "x"}}, "datasets takes a list"),
        ({"datasets": ["x"]}, "datasets takes a list of mappings"),
        ({"datasets": []}, "no folder to train on"),
        ({"datasets": [{"caption_ext": "txt"}]}, "datasets[0].folder_path is missing"),
        ({"datasets__resolution": "big"}, "datasets[0].resolution takes a whole number"),
        ({"datasets__resolution": [512, None]}, "datasets[0].resolution takes a whole number"),
        ({"sample__prompts": [1]}, "sample.prompts takes a list of texts"),
        ({"sample__samples": "x"}, "sample.samples takes a list of mappings"),
        ({"device": "mps"}, "device"),
        ({"type": "slider_trainer"}, "'slider_trainer' is not supported"),
    ],
)
def test_what_is_refused_names_their_key(changes, part):
    assert part in refused(theirs(**changes)).message


@pytest.mark.parametrize(
    "raw, part",
    [
        ({"job": "extension"}, "config is missing"),
        ({"job": "extension", "config": [1]}, "config is missing"),
        ({"job": "extract", "config": {"name": "x", "process": [{}]}}, "'extract' is not"),
        ({"job": "extension", "config": {"process": [{}]}}, "config.name"),
        ({"job": "extension", "config": {"name": "x"}}, "a list of one process, got None"),
        ({"job": "extension", "config": {"name": "x", "process": [{}, {}]}}, "process, got 2"),
        ({"job": "extension", "config": {"name": "x", "process": [5]}}, "process[0] takes"),
        ({"job": "extension", "config": {"name": "x", "process": [{}]}}, "type None"),
    ],
)
def test_a_form_that_is_not_one_training(raw, part):
    assert is_ai_toolkit(raw)
    assert part in refused(raw).message


def test_every_mistake_is_named_at_once():
    message = refused(theirs(train__steps="x", datasets__flip_x=3, network__type="lorm")).message
    for part in ("train.steps", "datasets[0].flip_x", "network.type"):
        assert part in message


@pytest.mark.grid(5)
@pytest.mark.parametrize("junk", [True, -1, "", "x", [[]], {1: 2}, 10**400, float("nan")], ids=str)
def test_any_value_in_any_place_is_converted_or_refused(junk):
    stock = parse_yaml((EXAMPLES / "flux_dev_24gb.yaml").read_text(encoding="utf-8"))

    def places(node, path=()):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield (*path, key)
            if isinstance(value, dict | list):
                yield from places(value, (*path, key))

    for *parents, last in places(stock):
        raw = copy.deepcopy(stock)
        node = raw
        for key in parents:
            node = node[key]
        node[last] = junk
        try:
            native, notes = convert_ai_toolkit(raw)
            assert len(set(keys(notes))) == len(notes)
            build_config(native)
        except ConfigError as error:
            assert "\n" not in error.message


def test_a_native_configuration_is_left_alone():
    assert not is_ai_toolkit({"model": {"path": "m"}, "data": {"folder": "f"}})
    assert not is_ai_toolkit({"config": 5})


# ---------------------------------------------------------------- through the command line


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_mistake_in_the_file_ends_in_one_message(fluxfast, folder):
    (folder / "c.yaml").write_text(yaml.safe_dump(theirs(train__steps="x")))
    result = fluxfast("train", "c.yaml")
    assert result.code == 2
    assert result.error == "error: c.yaml: train.steps takes a whole number, got 'x'"


def test_notes_go_to_stderr_and_overrides_use_native_keys(fluxfast, folder, monkeypatch):
    from fluxfast import train

    seen = []
    monkeypatch.setattr(train, "train", lambda config, restart: seen.append(config))
    (folder / "c.yaml").write_text(yaml.safe_dump(theirs(train__lr_sheduler="cosine")))
    sets = ("--set", "train.steps=7", "--set", "data.resolution=64")
    code, _, err = fluxfast("train", "c.yaml", *sets, "--trigger", "ohwx")
    assert code == 0
    assert err == ("note: train.lr_sheduler: unknown, ignored; did you mean train.lr_scheduler?\n")
    assert seen[0].train.steps == 7 and seen[0].trigger == "ohwx"
    assert seen[0].data[0].resolution == [64]


@pytest.mark.slow
def test_a_stock_file_trains(fluxfast, folder, nano_model):
    """The shipped dev file with other paths and sizes, nothing else."""
    text = (EXAMPLES / "flux_dev_24gb.yaml").read_text(encoding="utf-8")
    photos = folder / "photos"
    photos.mkdir()
    for name, color in (("a", "red"), ("b", "teal")):
        Image.new("RGB", (96, 64), color).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text(f"a {color} picture")
    for before, after in (
        ("cuda:0", "cpu"),
        ("examples/nano/photos", "photos"),
        ("black-forest-labs/FLUX.1-dev", str(nano_model)),
        ("[512, 768, 1024]", "[64, 96]"),
        ("steps: 2000", "steps: 2"),
        ("sample_steps: 20", "sample_steps: 2"),
        ("1024", "64"),
    ):
        assert before in text
        text = text.replace(before, after)
    (folder / "theirs.yaml").write_text(text, encoding="utf-8")
    code, out, err = fluxfast("train", "theirs.yaml")
    assert (code, out) == (0, "output/my_flux_lora/my_flux_lora.safetensors\n"), err
    notes = [line.removeprefix("note: ") for line in err.splitlines() if line.startswith("note: ")]
    assert set(keys(notes)) >= STOCK_NOTES
    run = folder / "output" / "my_flux_lora"
    with safe_open(run / "my_flux_lora.safetensors", "pt") as file:
        assert any("norm1.linear" in name for name in file.keys())  # noqa: SIM118
        assert file.metadata()["steps"] == "2"
    assert (run / "my_flux_lora_ema.safetensors").is_file()
    written = load_config(run / "config.yaml")
    assert written.lora.targets == "all" and written.train.optimizer == "adamw8bit"
