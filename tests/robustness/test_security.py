"""What SECURITY.md promises of files and settings that strangers made."""

import ast
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import EpsImagePlugin, Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from small import noise_pictures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fluxfast.config.ai_toolkit import convert_ai_toolkit
from fluxfast.config.schema import build_config, load_config
from fluxfast.config.yaml_io import DEEPEST, LARGEST, parse_yaml
from fluxfast.errors import ConfigError, FluxfastError
from fluxfast.run.report import write_report
from fluxfast.sampling.sheet import contact_sheet
from fluxfast.train import train
from fluxfast.util.redact import names_secret, plain
from fluxfast.util.terminal import log_to_terminal

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = next((ROOT / "examples/nano/pretrained/transformer").glob("*.safetensors"))
LOG = logging.getLogger("fluxfast.somewhere")
TOKEN = "hf_" + "aB3" * 11
EVIL = "<script>alert(1)</script>"
PREVIEW = {"width": 64, "height": 64, "steps": 1, "every": 0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return noise_pictures(tmp_path_factory.mktemp("photos"), 2, caption="noise")


def minimal(**changes) -> dict:
    return {"model": {"path": "m"}, "data": {"folder": "photos"}, **changes}


# ---------------------------------------------------------------- no code from elsewhere


def test_no_source_lets_a_model_bring_code():
    """Neither the switch, nor the classes that look up in a file which class they are."""
    folders = ("fluxfast", "kernels", "bench", "examples")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code" not in text, path
        named = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        assert not {name for name in named if re.match(r"Auto(Model|Tokenizer|Config|Proc)", name)}


@pytest.fixture
def copied_model(nano_model, tmp_path) -> Path:
    return shutil.copytree(nano_model, tmp_path / "model")


def load_component(root: Path, part: str) -> tuple | None:
    """Load what is in the folder `part`. Returns an encoded prompt, nothing of the VAE."""
    from fluxfast.encoders.text import TextEncoders
    from fluxfast.encoders.vae import Vae

    return Vae(root) and None if part == "vae" else TextEncoders(root).encode(["a word"], 8)


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "part", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"]
)
def test_code_beside_a_model_is_not_run(copied_model, tmp_path, part):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n"
    (copied_model / part / "evil.py").write_text(code)
    classes = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.Evil")
    for name in ("config.json", "tokenizer_config.json"):
        if (file := copied_model / part / name).is_file():
            change_json(file, auto_map=classes)
    load_component(copied_model, part)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_component_that_is_a_pickle_is_refused(copied_model, tmp_path, part):
    class Boom:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (weights,) = (copied_model / part).glob("*.safetensors")
    name = "diffusion_pytorch_model.bin" if part == "vae" else "pytorch_model.bin"
    plain_tensors = load_file(weights)
    weights.unlink()
    for content in (plain_tensors, Boom()):
        torch.save(content, copied_model / part / name)
        with pytest.raises(FluxfastError, match="cannot load"):
            load_component(copied_model, part)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae"])
@pytest.mark.parametrize("way", ["pickle", "outside", "settings", "broken"])
def test_no_index_leads_to_a_pickle_or_out_of_the_folder(copied_model, monkeypatch, part, way):
    """Transformers and diffusers open what an index names as what its ending says, although they
    are told to use safetensors."""
    folder = copied_model / part
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    name = {"outside": "../evil.safetensors", "broken": part}.get(way, "evil.bin")
    index = folder / f"{weights.name}.index.json"
    if way == "outside":
        shutil.copy(weights, folder / name)
    elif way != "broken":
        torch.save(tensors, folder / name)
    if way == "settings":
        change_json(folder / "config.json", transformers_weights=name)
    elif way == "broken":
        index.write_text("[" * 100_000)
    else:
        table = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, name)}
        index.write_text(json.dumps(table))
    weights.unlink()
    loaded = []
    monkeypatch.setattr(torch, "load", lambda *args, **options: loaded.append(args))
    with pytest.raises(FluxfastError, match=f"cannot load .*{name}"):
        load_component(copied_model, part)
    assert not loaded


def test_an_index_of_pickles_beside_safetensors_is_passed_over(copied_model):
    table = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}
    file = copied_model / "text_encoder_2" / "pytorch_model.bin.index.json"
    file.write_text(json.dumps(table))
    load_component(copied_model, "text_encoder_2")


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_no_model_chooses_a_repository_of_compiled_attention(nano_model, copied_model, part, key):
    """Transformers fetches `owner/name` from the Hub and runs what is in it."""
    change_json(copied_model / part / "config.json", **{key: "owner/kernel"})
    encoded = load_component(copied_model, part)
    assert all(map(torch.equal, encoded, load_component(nano_model, part)))


# ---------------------------------------------------------------- YAML that grows

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {k: v}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}], k{i}: v}}\n" for i in range(1, 10)
)
LONG = f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 100)}]\n"
GROWING = {
    "aliases of aliases": (LAUGHS, "its aliases make more than"),
    "merges of merges": (MERGES, "its aliases make more than"),
    "a long text many times": (LONG, "its aliases make more than"),
    "an alias inside itself": ("a: &a [*a]\n", "an alias in it refers to itself"),
    "a mapping inside itself": ("&a a: {b: *a, c: &c {d: *c}}\n", "refers to itself"),
    "lists in lists": ("[" * 100_000, "levels deep"),
    "mappings in mappings": ("".join(f"{' ' * i}a:\n" for i in range(60)), "levels deep"),
    "depth by aliases": (
        "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 70)),
        "levels deep",
    ),
    "a large file": ("# " + "x" * LARGEST + "\n", f"is larger than {LARGEST} bytes"),
    "a long word": ("x" * (LARGEST - 9), "got str"),
    "a long number": ("a: " + "9" * 5000, "a number of more than"),
    "a long number of base 16": ("a: 0x" + "f" * 5000, "a number of more than"),
    "python's own tags": ("a: !!python/object/apply:os.system [id]\n", "only plain ones are read"),
    "bytes": ("a: !!binary /w==\n", "only plain ones are read"),
    "a set": ("a: !!set {b: null}\n", "only plain ones are read"),
}


@pytest.mark.parametrize("name", GROWING)
def test_yaml_that_would_grow_is_refused_in_a_line(tmp_path, name):
    content, part = GROWING[name]
    file = tmp_path / "c.yaml"
    file.write_text(content)
    started = time.process_time()
    with pytest.raises(ConfigError) as raised:
        load_config(file)
    assert time.process_time() - started < 5
    message = raised.value.message
    assert str(file) in message and part in message and "\n" not in message and len(message) < 500


def test_aliases_and_merges_of_an_ordinary_size_are_read(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: {path: m}\n.common: &common {resolution: 512, flip: true}\n"
        "data: [{folder: a, <<: *common}, {folder: b, <<: *common, flip: false}]\n"
    )
    with pytest.raises(ConfigError, match=r"unknown key '\.common'"):
        load_config(file)
    file.write_text(
        "model: {path: m}\n"
        "data: [&one {folder: a, resolution: 512, flip: true}, {<<: *one, folder: b}]\n"
    )
    entries = [(str(each.folder), each.resolution, each.flip) for each in load_config(file).data]
    assert entries == [("a", [512], True), ("b", [512], True)]
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert str(parse_yaml(deep)) == deep
    with pytest.raises(ValueError, match="levels deep"):
        parse_yaml(f"[{deep}]")


def test_text_that_is_put_into_text_does_not_grow():
    """What stands for [name] or [trigger] is short: a megabyte of them would be a hundred GiB."""
    config = {"name": "n" * 151, "process": [{"type": "sd_trainer", "trigger_word": "[name]"}]}
    with pytest.raises(ConfigError, match="config.name .* of 1 to 150 characters, got .{,80}$"):
        convert_ai_toolkit({"job": "extension", "config": config})
    with pytest.raises(ConfigError, match="trigger takes at most 1000 characters") as raised:
        build_config(minimal(trigger="t" * 1001))
    assert len(raised.value.message) < 300


def test_a_dotted_name_without_end_takes_no_time(tmp_path):
    toml = tmp_path / "d.toml"
    toml.write_text("a." * 400_000 + "a = 1")
    started = time.process_time()
    with pytest.raises(ConfigError, match=r"d\.toml has more than 300 dots in a line"):
        build_config(minimal(data=str(toml)))
    assert time.process_time() - started < 5


def test_other_ways_in_have_the_same_limits(tmp_path):
    file = tmp_path / "check.yaml"
    file.write_text(LAUGHS)
    with pytest.raises(ConfigError, match="its aliases make more than"):
        build_config(minimal(model={"path": "m", "layers": str(file)}))
    with pytest.raises(ConfigError, match="is not a YAML value"):
        build_config(minimal(), ["train.optimizer_args={a: &a [*a]}"])
    toml = tmp_path / "d.toml"
    toml.write_text("#" * (LARGEST + 1))
    with pytest.raises(ConfigError, match=r"d\.toml is larger than"):
        build_config(minimal(data=str(toml)))
    (tmp_path / "config.yaml").write_text(LAUGHS)
    assert "config.yaml cannot be parsed" in write_report(tmp_path).read_text()


def test_an_endless_file_is_not_read_to_its_end():
    with pytest.raises(ConfigError, match="larger than"):
        load_config("/dev/zero")


NUMBERS = """
train.steps train.batch_size train.gradient_accumulation train.lr train.guidance log_every
lora.rank lora.alpha data.num_repeats data.resolution data.shuffle_variants sample.width
sample.steps sample.guidance save.keep validation.timesteps model.max_sequence_length
"""


@pytest.mark.parametrize("key", NUMBERS.split())
@pytest.mark.parametrize("number", ["1000000000001", "1e300", "9" * 300])
def test_numbers_that_nobody_means_are_refused(key, number):
    """They would end in a full memory, or never."""
    with pytest.raises(ConfigError, match=rf"{re.escape(key.split('.')[-1])}.*") as raised:
        build_config(minimal(), [f"{key}={number}"])
    assert len(raised.value.message) < 500


def test_what_is_shown_of_a_mistake_is_short():
    raw = minimal(train={"steps": "9" * 100_000}, **{"x" * 100_000: 1})
    raw["lora"] = {f"key{i}": i for i in range(1000)}
    with pytest.raises(ConfigError) as raised:
        build_config(raw)
    assert len(raised.value.message) < 5000 and "more" in raised.value.message


# ---------------------------------------------------------------- nothing is written elsewhere

NAMES = ["../x", "/tmp/x", "..", ".", "", "\\\\host\\x", "a\n", "-a", ".a", "a\0", "~/x", "\u202ea"]
NAMES += [" ", "n" * 151, "é" * 76]


def job(**changes) -> dict:
    """An ai-toolkit file's content; changes of its process."""
    process = {
        "type": "sd_trainer",
        "model": {"name_or_path": "m", "is_flux": True},
        "network": {"linear": 4},
        "datasets": [{"folder_path": "a"}],
        **changes,
    }
    return {"job": "extension", "config": {"name": "x", "process": [process]}}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_plain_one_is_refused(name):
    with pytest.raises(ConfigError):
        build_config(minimal(name=name))
    raw = job()
    raw["config"]["name"] = name
    with pytest.raises(ConfigError):
        build_config(convert_ai_toolkit(raw)[0])


@pytest.mark.parametrize("name", ["a/b", "a/../../b", "a\\b", "C:x", "a/..", "x/con*?"])
def test_a_name_with_slashes_is_one_folder_of_the_output(name):
    config = build_config(minimal(name=name))
    assert config.run_dir.parent == config.output_dir
    assert not set(config.name) & set('/\\:*?"<>|')


def test_a_hostile_run_writes_into_its_own_folders_alone(configure, photos, tmp_path, monkeypatch):
    """Paths in every place that takes text: captions, metadata, prompts, triggers, extensions."""
    home = tmp_path / "home"
    data = shutil.copytree(photos, home / "photos")
    away = "../../../away"
    (data / "0.txt").write_text(f"{away}/caption /{tmp_path}/away/x")
    row = {"file_name": f"{away}/3.png", "text": f"{tmp_path}/away"}
    (data / "metadata.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(home)
    config = configure(
        name="run",
        output_dir="runs",
        cache_dir="cache",
        trigger=f"{away}/x",
        data={"folder": "photos", "resolution": 64, "caption_ext": ".txt", "caption_prefix": away},
        sample={"prompts": [f"{away}/p.png", f"{tmp_path}/away/q"], **PREVIEW},
        train__steps=1,
        lora__include=["img_attn"],
    )
    before = files(tmp_path)
    train(config)
    new = files(tmp_path) - before
    assert new and all(path.parts[:2] in (("home", "runs"), ("home", "cache")) for path in new)


@pytest.fixture
def away(tmp_path) -> Path:
    """A folder outside, with a file that a run would tidy up in its own."""
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / ".mine.partial").touch()
    yield tmp_path / "away"
    assert [path.name for path in (tmp_path / "away").iterdir()] == [".mine.partial"]


@pytest.mark.parametrize("name", ["checkpoints", "samples", "tensorboard", "metrics.jsonl"])
def test_a_run_folder_with_links_out_of_it_is_refused(configure, away, name):
    """As one that somebody hands over to go on with: nothing is written, nor tidied up there."""
    config = configure(name="run")
    config.run_dir.mkdir(parents=True)
    (config.run_dir / name).symlink_to(away / "new" if "." in name else away)
    with pytest.raises(ConfigError, match=rf"{name} is a link to {away}") as raised:
        train(config)
    assert raised.value.hint


@pytest.mark.parametrize("name", ["latents", "text"])
def test_a_cache_folder_with_links_out_of_it_is_refused(configure, tmp_path, away, name):
    config = configure(cache_dir=str(tmp_path / "own"))
    config.cache_path.mkdir()
    (config.cache_path / name).symlink_to(away)
    with pytest.raises(ConfigError, match=rf"{name} is a link to {away}"):
        train(config)


@pytest.mark.slow
def test_files_that_are_links_are_replaced_and_not_written_through(configure, tmp_path):
    """The rest of a run's folder is written whole and put in place."""
    config = configure(
        name="run",
        cache_dir=str(tmp_path / "own"),
        train__steps=2,
        save__every=1,
        sample={"prompts": ["a"], **PREVIEW},
    )
    train(config)
    mine, replaced = tmp_path / "mine", []
    mine.write_text("mine")
    written = [*config.run_dir.glob("*.*"), *config.run_dir.glob("samples/*")]
    for path in [*written, *config.cache_path.rglob("*.*")]:
        if path.is_file() and path.name != "metrics.jsonl":
            path.unlink()
            path.symlink_to(mine)
            replaced.append(path.name)
    assert len(replaced) > 10
    longer = config.model_copy(deep=True)
    longer.train.steps = 3
    train(longer)
    assert mine.read_text() == "mine"


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_text_that_no_file_can_hold_is_refused():
    for text in ("a\0b", "half \ud83d", "\udce9"):
        with pytest.raises(ConfigError, match="trigger holds a character that no text file can"):
            build_config(minimal(trigger=text))
        with pytest.raises(ConfigError, match=r"data\.0\.folder holds a character"):
            build_config(minimal(data=[{"folder": f"photos{text}"}]))


# ---------------------------------------------------------------- access tokens


@pytest.mark.parametrize(
    "raw, place",
    [
        (minimal(trigger=f"a {TOKEN}"), "trigger"),
        (minimal(model={"path": f"https://user:{TOKEN}@hub/x"}), "model.path"),
        (minimal(hf_token=TOKEN), "hf_token"),
        (minimal(sample={"prompts": ["a", TOKEN]}), "sample.prompts.1"),
        (minimal(train={"optimizer_args": {TOKEN: 1}}), "a key in train.optimizer_args"),
        (minimal(data=[{"folder": TOKEN}]), "data.0.folder"),
    ],
)
def test_a_token_in_the_settings_is_refused_and_not_repeated(raw, place):
    with pytest.raises(ConfigError) as raised:
        build_config(raw)
    assert raised.value.message.startswith(f"{place} holds an access token")
    assert TOKEN not in str(raised.value) and "HF_TOKEN" in raised.value.hint


def test_a_token_in_settings_of_others_is_not_repeated_either(tmp_path, fluxfast, monkeypatch):
    """Where what is wrong with a value would show it, and where a picture would hold it."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(job(train={"lr": TOKEN})))
    (tmp_path / "d.toml").write_text(f'[general]\nresolution = "{TOKEN}"\n')
    for load in (
        lambda: load_config(tmp_path / "c.yaml"),
        lambda: build_config(minimal(data=str(tmp_path / "d.toml"))),
    ):
        with pytest.raises(ConfigError, match="holds an access token") as raised:
            load()
        assert TOKEN not in str(raised.value)
    monkeypatch.chdir(tmp_path)
    for prompt in (TOKEN, "half \udce9"):
        code, out, err = fluxfast("sample", "--model", "m", "--prompt", prompt)
        assert code == 2 and err.startswith("error: --prompt.0 holds ") and TOKEN not in err
    assert not (tmp_path / "samples").exists()


def test_the_token_of_the_environment_is_refused_whatever_its_form(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "my-own-secret")
    with pytest.raises(ConfigError, match="trigger holds an access token") as raised:
        build_config(minimal(trigger="x my-own-secret y"))
    assert "my-own-secret" not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", "")  # set, and empty: nothing is a token then
    assert build_config(minimal(trigger="x")).trigger == "x"


SECRETS = """
HF_TOKEN AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID my_password APIKEY OPENAI_KEY GITHUB_PAT MYSQL_PWD
PGPASSFILE DATABASE_URL SENTRY_DSN NPM_AUTH SSH_KEYS
"""
HARMLESS = ["PWD", "HOME", "MONKEY_DATA", "KEYBOARD", "AUTHOR", "CURLY", "PATTERNS"]


@pytest.mark.parametrize("variable", SECRETS.split())
def test_secrets_of_the_environment_are_not_put_into_settings(monkeypatch, variable):
    """A file of ai-toolkit's may name variables: a stranger's could publish them in the LoRA."""
    monkeypatch.setenv(variable, "s3cret-value")
    with pytest.raises(ConfigError, match="may hold a secret") as raised:
        convert_ai_toolkit(job(trigger_word=f"${{{variable}}}"))
    assert variable in raised.value.message and "s3cret-value" not in str(raised.value)


def test_other_variables_of_the_environment_are_put_in(monkeypatch):
    monkeypatch.setenv("PICTURES", "photos")
    raw, _ = convert_ai_toolkit(job(datasets=[{"folder_path": "${PICTURES}"}]))
    assert raw["data"][0]["folder"] == "photos"
    assert not any(map(names_secret, HARMLESS))


def test_no_token_is_printed_or_saved(configure, monkeypatch, fluxfast, tmp_path, photos):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    screen = io.StringIO()
    sample = {"prompts": ["a"], **PREVIEW}
    config = configure(train__steps=1, save__every=1, validation__share=0.5, sample=sample)
    with log_to_terminal(Console(file=screen, width=300)):
        train(config)
    assert TOKEN not in screen.getvalue()
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    for arguments in (
        ["doctor"],
        ["train", f"{TOKEN}.yaml"],
        ["train", "x", "--set", TOKEN],
        ["inspect", TOKEN],
        ["train", photos, "--model", TOKEN],
    ):
        code, out, err = fluxfast(*arguments)
        assert TOKEN not in out + err and (code or arguments == ["doctor"])


def test_no_token_reaches_a_handler_of_the_caller(log_lines, caplog, capfd):
    """The command line's handler, one on the package's logger, one on the root, and none at all."""
    screen = io.StringIO()
    with log_to_terminal(Console(file=screen, width=300)):
        LOG.warning("note: could not reach the Hub with %s", TOKEN)
    assert screen.getvalue() == f"{log_lines[0]}\n" == "note: could not reach the Hub with ***\n"
    assert caplog.messages == log_lines
    code = f"import logging, fluxfast; logging.getLogger('fluxfast.x').warning({TOKEN!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert capfd.readouterr().err == "***\n"


# ---------------------------------------------------------------- what is shown


def test_a_line_is_one_line_and_moves_nothing(monkeypatch):
    monkeypatch.setattr(logging.getLogger("fluxfast"), "propagate", False)  # half a character
    screen = io.StringIO()
    with log_to_terminal(Console(file=screen, width=300)):
        LOG.info("a\nb\r\x1b[2J\x1b]0;title\x07 \u202egnp.exe \udce9 é 写真")
    expected = r"a\nb\r\x1b[2J\x1b]0;title\x07 \u202egnp.exe \udce9 é 写真"
    assert screen.getvalue() == f"{expected}\n"
    assert plain("C:\\new [bold]x[/]") == "C:\\new [bold]x[/]"


def test_the_command_line_says_it_in_one_line_too(fluxfast, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = fluxfast("train", "a\n\x1b[31m.yaml")
    assert code == 2 and err.splitlines()[0] == r"error: a\n\x1b[31m.yaml does not exist"
    assert len(err.splitlines()) == 2
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"a\n\x1b[31m": 1, **minimal()}))
    code, out, err = fluxfast("train", "c.yaml")
    assert code == 2 and "\x1b" not in err and len(err.splitlines()) == 2


def test_what_is_printed_for_scripts_moves_nothing_either(fluxfast, tmp_path):
    name = "transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight"
    factors = {name.format("A"): torch.ones(2, 64), name.format("B"): torch.ones(64, 2)}
    keys = ("fluxfast.storage", "fluxfast.version", "format", "ss_name", "software")
    strange = dict.fromkeys(keys, "\x1b[31m\nx")
    for tensors in (factors, load_file(SHIPPED)):
        save_file(tensors, tmp_path / "a.safetensors", metadata=strange)
        code, out, _ = fluxfast("inspect", tmp_path / "a.safetensors")
        assert not code and out.replace("\n", "").isprintable() and "[31m\n" not in out
    for key in ("output_dir", "cache_dir"):
        with pytest.raises(ConfigError, match=f"{key} holds U.001B"):
            build_config(minimal(**{key: "runs\x1b]0;x\x07"}))
        assert build_config(minimal(**{key: "写　真/é 🎨"}))


def test_only_png_is_read_of_a_run_folder(configure, tmp_path, monkeypatch):
    """A preview of another kind is a blank cell: Pillow hands some kinds to programs."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)  # to call it would be a TypeError
    Image.init()
    paths = [tmp_path / f"{name}.png" for name in ("eps", "cut", "pipe", "gone", "fine")]
    for path in paths[::4]:
        Image.new("RGB", (300, 64), "red").save(path, "EPS" if path.stem == "eps" else "PNG")
    paths[1].write_bytes(paths[4].read_bytes()[:-30])
    os.mkfifo(paths[2])
    contact_sheet([("a", paths)], ["x"] * 5, tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as sheet:
        cells = [sheet.getpixel((160 + 256 * x + 20, 24 + 20)) for x in range(5)]
    assert cells == [(250, 250, 250)] * 4 + [(255, 0, 0)]
    shutil.copy(paths[0], tmp_path / "samples.png")
    assert "samples.png is not a picture" in write_report(tmp_path).read_text()


def test_tensorboard_gets_numbers_under_fixed_names_and_no_text(configure):
    sample = {"prompts": [EVIL], **PREVIEW}
    config = configure(trigger=f"ohwx {EVIL}", train__steps=2, sample=sample)
    train(config)
    folder = config.run_dir / "tensorboard"
    board = EventAccumulator(str(folder))
    board.Reload()
    tags = board.Tags()
    scalars = "loss loss_smooth grad_norm lr it_per_s s_per_it epoch peak_memory_gib skipped_steps"
    assert {tag.removeprefix("train/") for tag in tags.pop("scalars")} <= set(scalars.split())
    assert not any(tags.values())
    assert not any(b"script" in path.read_bytes() for path in folder.iterdir())
    page = (config.run_dir / "report.html").read_text()
    assert EVIL not in page and "&lt;script&gt;" in page


# ---------------------------------------------------------------- the promises


def test_every_promise_names_a_test_that_there_is():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 10
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), test
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`tests/" not in line]
    assert len(rows) == 1, "every row but the head names its test"
