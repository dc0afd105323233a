"""ai-toolkit's YAML: what each key becomes, the notes about it, what is refused."""

import copy
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

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "ai-toolkit"


def theirs(**changes) -> dict:
    """A short file of their form; `train__lr=1` sets train.lr, `datasets__…` the one data set."""
    process = {
        "type": "sd_trainer",
        "network": {"type": "lora", "linear": 16, "linear_alpha": 16},
        "datasets": [{"folder_path": "photos"}],
        "model": {"name_or_path": "m", "is_flux": True},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        node = process
        for section in sections:
            node = node["datasets"][0] if section == "datasets" else node.setdefault(section, {})
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
STOCK_NOTES = {
    "meta",
    "model.quantize",
    "train.ema_config.use_ema",
    "datasets[0].cache_latents_to_disk",
    "train.gradient_checkpointing",
}


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
        - {folder_path: a, caption_ext: caption, caption_dropout_rate: 0.5, shuffle_tokens: true,
           keep_tokens: 2, resolution: 768, num_repeats: 3, flip_x: true, mask_path: masks,
           invert_mask: false, mask_min_value: 0.2, default_caption: a photograph}
        - {folder_path: b, alpha_mask: true}
        - {folder_path: c, is_reg: true}
        - {folder_path: d, prior_reg: true}
      train:
        {batch_size: 2, steps: 100, gradient_accumulation_steps: 4, gradient_accumulation: 1,
         train_unet: true, timestep_type: lognorm_blend, linear_timesteps: false,
         linear_timesteps2: false, content_or_style: style, optimizer: prodigy8bit, lr: 1e-4,
         optimizer_params: {weight_decay: 0.01}, lr_scheduler: cosine,
         lr_scheduler_params: {num_warmup_steps: 40, eta_min: 1e-6}, max_grad_norm: 0.5,
         skip_first_sample: true, disable_sampling: false,
         ema_config: {use_ema: true, ema_decay: 0.9}, dtype: fp16, cfg_scale: 2.0}
      model: {name_or_path: m, arch: flux, is_flux: true, quantize: true, assistant_lora_path: x,
              extras_name_or_path: parts}
      sample:
        {sample_every: 50, width: 512, height: 640, samples: [{prompt: "[trigger] runs", seed: 1}],
         seed: 7, walk_seed: true, guidance_scale: 3, sample_steps: 10}
      logging: {log_every: 5}
meta: {name: "[name]"}
"""
EVERY_NOTES = """
meta trigger_word network.linear_alpha datasets[0].shuffle_tokens datasets[0].flip_x
datasets[2].is_reg datasets[3].prior_reg train.gradient_accumulation_steps train.timestep_type
train.optimizer train.lr train.lr_scheduler_params.eta_min train.ema_config.use_ema train.dtype
model.quantize sample.samples
"""
NATIVE = """
name: all
output_dir: out
device: cpu
seed: 3
trigger: ohwx
log_every: 5
model: {path: m, encoders: parts, storage: auto, compute: bf16, assistant_lora: x}
lora: {rank: 8, alpha: 4, dropout: 0.1, targets: all, include: [attn], exclude: [norm],
  init_from: x}
data:
  - {folder: a, caption_ext: .caption, caption_dropout: 0.5, shuffle_captions: true, keep_tokens: 3,
     resolution: 768, num_repeats: 6, flip: true, mask: folder, mask_folder: masks, mask_min: 0.2,
     default_caption: a photograph}
  - {folder: b, mask: alpha, resolution: 512, caption_dropout: 0.0, keep_tokens: 0}
train: {steps: 25, batch_size: 2, gradient_accumulation: 4, lr: 1.0, optimizer: prodigy,
  optimizer_args: {eps: 0.000001, weight_decay: 0.01}, lr_schedule: cosine, warmup_steps: 10,
  max_grad_norm: 0.5, timesteps: sigmoid, timestep_bias: style, guidance: 2.0,
  ema: {enabled: true, decay: 0.9}}
save: {every: 2, keep: 2, dtype: bf16}
sample: {prompts: ["[trigger] runs"], every: 13, first: false, width: 512, height: 640, steps: 10,
  guidance: 3, seed: 7, walk_seed: true}
"""


def test_every_mapped_key():
    """One note for each key that is read differently, none for any other."""
    native, notes = convert_ai_toolkit(parse_yaml(EVERY))
    assert sorted(keys(notes)) == sorted(EVERY_NOTES.split())
    assert build_config(native) == build_config(yaml.safe_load(NATIVE))
    (process,) = parse_yaml(EVERY)["config"]["process"]
    process["datasets"] = process["datasets"][0]
    assert all(exists(process, key.split(".")) for key in TABLE.mapped)


def exists(node: dict, path: list[str]) -> bool:
    return path[0] in node and (len(path) == 1 or exists(node[path[0]], path[1:]))


@pytest.mark.grid(81)
@pytest.mark.parametrize("key", sorted(TABLE.ignored))
def test_an_ignored_key_is_noted_once_and_its_resting_values_never(key):
    place = key.replace(".", "__")
    _, notes = read(**{place: "something"})
    assert keys(notes) == [key.replace("datasets.", "datasets[0].")]
    for value in TABLE.ignored[key][1]:
        assert read(**{place: value})[1] == []


def test_every_native_key_of_the_table_is_a_setting():
    assert {row.native for row in TABLE.mapped.values()} <= all_keys(Config)


# ---------------------------------------------------------------- meaning, group by group


def test_alpha_is_read_as_written_with_a_note():
    config, notes = read(network__linear=32, network__linear_alpha=8)
    assert (config.lora.rank, config.lora.alpha) == (32, 8)
    (note,) = notes
    assert note.startswith("network.linear_alpha: ") and "lora.alpha=32" in note
    assert read(network__linear=32, network__linear_alpha=32)[1] == []
    assert read(network__linear_alpha=1, network__rank=8)[0].lora.rank == 8


@pytest.mark.parametrize(
    "changes, kind, noted",
    [
        ({}, "sigmoid", []),
        ({"timestep_type": "linear"}, "uniform", []),
        ({"linear_timesteps": True}, "linear", []),
        ({"timestep_type": "linear", "linear_timesteps": True}, "linear", []),
        ({"timestep_type": "weighted"}, "linear", ["train.timestep_type"]),
        ({"timestep_type": "weighted", "linear_timesteps": True}, "linear", []),
        ({"linear_timesteps2": True}, "linear", ["train.linear_timesteps2"]),
        ({"timestep_type": "flux_shift"}, "flux_shift", []),
        ({"timestep_type": "lumina2_shift"}, "flux_shift", ["train.timestep_type"]),
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
            {"optimizer": "adam8bit", "optimizer_params": {"weight_decay": 0.1, "eps": 1e-8}},
            ("adamw8bit", 1e-6, {"eps": 1e-8, "weight_decay": 0.1}),
            ["train.optimizer_params"],
        ),
        ({"optimizer": "prodigy", "lr": 1.0}, ("prodigy", 1.0, {"eps": 1e-6}), []),
        ({"optimizer": "prodigy", "lr": 1e-4}, ("prodigy", 1.0, {"eps": 1e-6}), ["train.lr"]),
        ({"optimizer": "dadaptation"}, ("prodigy", 1.0, {"eps": 1e-6}), ["train.optimizer"]),
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
    "kind, params, expected, noted",
    [
        ("constant", {}, ("constant", 0), []),
        ("constant_with_warmup", {}, ("constant", 1000), []),
        ("constant_with_warmup", {"num_warmup_steps": 50}, ("constant", 50), []),
        ("linear", {"start_factor": 1.0, "end_factor": 0.0}, ("linear", 0), []),
        ("linear", {}, ("linear", 0), ["train.lr_scheduler"]),
        ("cosine", {"num_warmup_steps": 9}, ("cosine", 9), []),
        ("cosine_with_restarts", {"x": 2}, ("cosine", 0), ["train.lr_scheduler_params.x"]),
    ],
)
def test_schedules(kind, params, expected, noted):
    config, notes = read(train__lr_scheduler=kind, train__lr_scheduler_params=params)
    assert (config.train.lr_schedule, config.train.warmup_steps) == expected
    assert keys(notes) == noted


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
    changes = {"sample__prompts": ["a", "b"]}
    assert read(**changes)[0].sample.prompts == ["a", "b"]
    config, notes = read(**changes, train__disable_sampling=True)
    assert config.sample.prompts == [] and notes == []
    assert not read(**changes, train__skip_first_sample=True)[0].sample.first


def test_trigger_in_prompts():
    prompts = ["[trigger] runs", "a [name] --w 512 --d 3"]
    config, notes = read(sample__prompts=prompts, trigger_word="ohwx")
    assert config.trigger == "ohwx"
    assert config.sample.prompts == ["[trigger] runs", "a run"]
    assert sorted(keys(notes)) == ["sample.prompts", "trigger_word"]
    config, notes = read(sample__prompts=prompts)
    assert config.sample.prompts == ["runs", "a run"]
    assert keys(notes) == ["sample.prompts"]


def test_a_trigger_of_the_data_set_serves_where_it_is_the_only_one():
    raw = theirs(datasets__trigger_word="ohwx")
    assert convert_ai_toolkit(raw)[0]["trigger"] == "ohwx"
    raw["config"]["process"][0]["datasets"].append({"folder_path": "b", "trigger_word": "sks"})
    native, notes = convert_ai_toolkit(raw)
    assert "trigger" not in native
    assert keys(notes) == ["datasets[0].trigger_word", "datasets[1].trigger_word"]


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
        (
            {"train__optimizer": "lion"},
            "prodigy8bit, dadaptation, dadaptationadam, adafactor, got 'lion'",
        ),
        ({"train__optimizer_params": [1]}, "train.optimizer_params takes a mapping"),
        ({"train__lr_scheduler": "step"}, "cosine_with_restarts, got 'step'"),
        ({"train__lr_scheduler_params": {"num_warmup_steps": "x"}}, "num_warmup_steps takes"),
        ({"train__timestep_type": "four_step"}, "lognorm_blend, got 'four_step'"),
        ({"train__content_or_style": "both"}, "takes one of balanced, content, style"),
        ({"train__dtype": "int8"}, "train.dtype takes one of bf16"),
        ({"train__train_unet": False}, "nothing else to train"),
        ({"train__gradient_accumulation_steps": -1}, "-1 is not supported"),
        ({"train__gradient_accumulation_steps": 2, "train__gradient_accumulation": 2}, "exclude"),
        ({"train": 5}, "train takes a mapping of settings, got 5"),
        ({"network": None}, "network is missing"),
        ({"network__type": "lokr"}, "network.type takes one of lora, locon, got 'lokr'"),
        ({"network__linear": "x"}, "network.linear takes a whole number"),
        ({"network__linear": 0}, "lora.rank"),
        ({"model": {"is_flux": True}}, "model.path is missing"),
        ({"model__arch": "sdxl"}, "is not FLUX.1"),
        ({"model__is_xl": True}, "model.is_xl is another model"),
        ({"model__name_or_path": 5}, "model.name_or_path takes text, got 5"),
        ({"adapter": {"type": "ip"}}, "adapter is not a plain LoRA training"),
        ({"datasets": None}, "datasets takes a list of mappings, got None"),
        ({"datasets": {"folder_path": "x"}}, "datasets takes a list"),
        ({"datasets": ["x"]}, "datasets takes a list of mappings"),
        ({"datasets": []}, "no folder to train on"),
        ({"datasets": [{"caption_ext": "txt"}]}, "datasets[0].folder_path is missing"),
        ({"datasets__is_reg": True}, "no folder to train on"),
        ({"datasets__resolution": "big"}, "datasets[0].resolution takes a whole number"),
        ({"datasets__resolution": [512, None]}, "datasets[0].resolution takes a whole number"),
        ({"datasets__caption_ext": "json"}, "write the captions to .txt"),
        ({"datasets__invert_mask": True}, "save the masks inverted"),
        ({"datasets__control_path": "x"}, "no control pictures"),
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
    code, _, err = fluxfast("train", "c.yaml", "--set", "train.steps=7", "--trigger", "ohwx")
    assert code == 0
    assert err == ("note: train.lr_sheduler: unknown, ignored; did you mean train.lr_scheduler?\n")
    assert seen[0].train.steps == 7 and seen[0].trigger == "ohwx"


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
