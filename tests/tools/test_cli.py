"""The command line as a user meets it: exit codes, one clear message, what lands where."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from fluxfast import cli
from fluxfast.formats.base.reader import open_base

ROOT = Path(__file__).resolve().parents[2]
COLOR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")


class Result:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        """The one error line, after checking that there is nothing else of its kind."""
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        assert all(line.startswith("hint: ") for line in lines[lines.index(errors[0]) + 1 :])
        assert "Traceback" not in self.err and self.out == ""
        return errors[0]


@pytest.fixture
def fluxfast(monkeypatch, capfd, tmp_path):
    """Runs the command line in this process, inside an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments) -> Result:
        monkeypatch.setattr(sys, "argv", ["fluxfast", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return run


def process(*arguments, cwd: Path, code: str | None = None, **env) -> Result:
    """The same as a process of its own: `python -m fluxfast`, or python code."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "fluxfast"])]
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env={**kept, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def pictures(folder: Path, captions: bool = True) -> Path:
    folder.mkdir(parents=True)
    for index, color in enumerate(("red", "teal")):
        Image.new("RGB", (64 + 16 * index, 64), color).save(folder / f"{index}.png")
        if captions:
            (folder / f"{index}.txt").write_text(f"a {color} square")
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    return pictures(tmp_path / "photos")


def config(path: Path, **changes) -> Path:
    raw = {"model": {"path": "/no/such/model"}, "data": {"folder": "photos"}, **changes}
    path.write_text(yaml.safe_dump(raw))
    return path


# ---------------------------------------------------------------- help


PROBE = """
import sys
sys.argv = ["fluxfast", *sys.argv[1:]]
from fluxfast.cli import main
try:
    main()
finally:
    print("LOADED", *sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_is_light(tmp_path, arguments):
    result = process(*arguments, cwd=tmp_path, code=PROBE)
    assert result.code == 0
    loaded = set(result.err.split("LOADED", 1)[1].split())
    # typer brings pydantic itself; the configuration's models are what costs time
    assert {name for name in loaded if name.startswith("fluxfast")} == {
        "fluxfast",
        "fluxfast.cli",
        "fluxfast.errors",
        "fluxfast.util",
        "fluxfast.util.redact",
        "fluxfast.util.terminal",
    }
    assert "typer" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "transformers", "diffusers", "yaml", "PIL"})
    assert not list(tmp_path.iterdir())


def test_help_names_commands_options_and_an_example(fluxfast):
    general = fluxfast("--help")
    assert general.code == 0
    for command in ("train", "cache", "check", "sample", "doctor"):
        assert command in general.out
        result = fluxfast(command, "--help")
        assert result.code == 0 and "Example" in result.out
    for option in ("--set", "--model", "--trigger", "--restart", "--name", "--encoders"):
        assert option in fluxfast("train", "--help").out


def test_no_color_is_honored(tmp_path):
    colored = process("--help", cwd=tmp_path, FORCE_COLOR="1")
    plain = process("--help", cwd=tmp_path, FORCE_COLOR="1", NO_COLOR="1")
    assert COLOR.search(colored.out)
    assert plain.code == 0 and not COLOR.search(plain.out)
    assert "train" in plain.out


# ---------------------------------------------------------------- exit code 2: the call is wrong


def test_a_call_that_typer_refuses(fluxfast):
    for arguments in ((), ("train",), ("trian",), ("train", "x", "--no-such-option")):
        result = fluxfast(*arguments)
        assert result.code == 2
        assert "Traceback" not in result.err


@pytest.mark.parametrize("command", ["train", "cache", "check"])
def test_a_target_that_does_not_exist(fluxfast, command):
    result = fluxfast(command, "absent.yaml")
    assert result.code == 2
    assert "absent.yaml does not exist" in result.error and "hint: " in result.err


@pytest.mark.parametrize("command", ["train", "cache", "check"])
def test_a_folder_needs_a_model(fluxfast, photos, command):
    result = fluxfast(command, "photos")
    assert result.code == 2
    assert "needs a model" in result.error and "--model" in result.err


@pytest.mark.parametrize(
    "content, part",
    [
        ("a: b: c", "not valid YAML"),
        ("- a", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("model: {path: m}", "data is missing"),
        ("model: {path: m}\ndata: {folder: f}\ntrain: {lerning_rate: 1}", "did you mean"),
        ("model: {path: m}\ndata: {folder: f}\ntrain: {steps: lots}", "train.steps"),
        ("model: {path: m}\ndata: {folder: f}\ndevice: tpu", "device"),
    ],
)
def test_a_bad_configuration(fluxfast, tmp_path, content, part):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    result = fluxfast("train", "c.yaml")
    assert result.code == 2
    assert part in result.error and "c.yaml" in result.error
    assert list(tmp_path.iterdir()) == [file]


def test_a_configuration_that_is_a_picture(fluxfast, photos):
    result = fluxfast("train", "photos/0.png")
    assert result.code == 2 and "not valid YAML" in result.error


@pytest.mark.parametrize(
    "override, part",
    [
        ("train.steps", "KEY=VALUE"),
        ("train.steps=few", "train.steps"),
        ("train.stesp=5", "did you mean 'train.steps'"),
        ("name=[", "not a YAML value"),
        ("data.5.flip=true", "not an index"),
        ("train..steps=5", "dot"),
    ],
)
def test_a_bad_override(fluxfast, tmp_path, override, part):
    config(tmp_path / "c.yaml")
    result = fluxfast("train", "c.yaml", "--set", override)
    assert result.code == 2 and part in result.error


def test_a_gpu_that_is_not_there(fluxfast, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config(tmp_path / "c.yaml", device="cuda:7")
    result = fluxfast("train", "c.yaml")
    assert result.code == 2 and "cuda:7" in result.error


@pytest.mark.parametrize("command", ["train", "cache", "check"])
def test_two_kinds_of_8_bits(fluxfast, tmp_path, command):
    """Refused before anything is looked for, the model too."""
    config(tmp_path / "c.yaml", model={"path": "absent", "storage": "int8", "compute": "fp8"})
    result = fluxfast(command, "c.yaml", "--set", "device=cpu")
    assert result.code == 2 and "storage int8 and compute fp8" in result.error
    assert "--set model.compute=int8" in result.err
    assert not (tmp_path / "runs" / "lora").exists()


@pytest.mark.parametrize(
    "option, word, part",
    [("--storage", "int3", "int8, fp8"), ("--compute", "nf4", "bf16, int8, fp8")],
)
def test_a_picture_in_an_unknown_precision(fluxfast, option, word, part):
    result = fluxfast("sample", "--model", "absent", "--prompt", "a", option, word)
    assert result.code == 2
    assert f"{option[2:]} {word!r} is not one of auto, fp32, " in result.error
    assert part in result.error


@pytest.mark.parametrize(
    "layers, part",
    [
        ({"single_blocks.0.liner1": "rotate"}, "did you mean 'single_blocks.0.linear1'"),
        ({"*.linear1": "rotate"}, "model.compute=int8"),
    ],
)
def test_layers_that_the_model_has_not(fluxfast, photos, nano_model, layers, part):
    result = fluxfast(
        "train",
        "photos",
        "--model",
        nano_model,
        "--set",
        "data.resolution=64",
        "--set",
        "model.compute=fp32",
        "--set",
        f"model.layers={json.dumps(layers)}",
        "--set",
        "device=cpu",
    )
    assert result.code == 2 and result.error.startswith("error: model.layers: ")
    assert part in result.err and "encoding" not in result.err


# ---------------------------------------------------------------- exit code 1: it failed


def test_a_model_that_does_not_exist(fluxfast, photos):
    result = fluxfast("train", "photos", "--model", "/no/such/model")
    assert result.code == 1
    assert "/no/such/model does not exist" in result.error and "hint: " in result.err


def test_a_model_that_cannot_be_read(fluxfast, photos, tmp_path):
    file = tmp_path / "flux.safetensors"
    file.write_bytes(b"<html>404</html>" * 20)
    result = fluxfast("train", "photos", "--model", file, "--encoders", tmp_path)
    assert result.code == 2 and f"cannot read {file}" in result.error
    (tmp_path / "empty").mkdir()
    result = fluxfast("train", "photos", "--model", file, "--encoders", "empty")
    assert result.code == 1
    assert "lacks vae" in result.error
    for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (tmp_path / "parts" / name).mkdir(parents=True)
        (tmp_path / "parts" / name / "config.json").write_text("{}")
    result = fluxfast("train", "photos", "--model", file, "--encoders", "parts")
    assert result.code == 2
    assert f"cannot read {file}" in result.error


def test_a_single_file_needs_encoders(fluxfast, photos, tmp_path):
    (tmp_path / "flux.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}")
    result = fluxfast("train", "photos", "--model", "flux.safetensors")
    assert result.code == 2
    assert "brings no vae, text_encoder" in result.error and "model.encoders" in result.err


def test_a_folder_of_images_that_does_not_exist(fluxfast, tmp_path, nano_model):
    config(tmp_path / "c.yaml", model={"path": str(nano_model)}, data={"folder": "absent"})
    result = fluxfast("train", "c.yaml")
    assert result.code == 1
    assert "cannot read the folder absent" in result.error


def test_a_folder_without_images(fluxfast, tmp_path, nano_model):
    (tmp_path / "empty").mkdir()
    result = fluxfast("train", "empty", "--model", nano_model)
    assert result.code == 1
    assert "no images in empty" in result.error


def test_a_broken_image(fluxfast, photos, nano_model):
    (photos / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    arguments = ("cache", "photos", "--model", nano_model, "--set", "data.resolution=64")
    result = fluxfast(*arguments, "--set", "data.strict=true")
    assert result.code == 1
    assert "0.png" in result.error
    result = fluxfast(*arguments)
    assert result.code == 0 and "1 samples" in result.err
    lines = [line for line in result.err.splitlines() if "skipped" in line]
    assert [line[:30] for line in lines] == [
        "skipped: photos/0.png is not a",
        "1 of 2 pictures skipped; stric",
    ]


def test_a_truncated_image(fluxfast, photos, nano_model):
    image = photos / "big.jpg"
    Image.effect_noise((128, 128), 90).convert("RGB").save(image)
    image.write_bytes(image.read_bytes()[:-3000])
    (photos / "big.txt").write_text("noise")
    arguments = ("cache", "photos", "--model", nano_model, "--set", "data.resolution=64")
    result = fluxfast(*arguments, "--set", "data.strict=true")
    assert result.code == 1
    assert "big.jpg" in result.error
    result = fluxfast(*arguments)
    assert result.code == 0 and "skipped: the image photos/big.jpg is broken" in result.err


def test_images_without_captions(fluxfast, tmp_path, nano_model):
    pictures(tmp_path / "bare", captions=False)
    result = fluxfast("cache", "bare", "--model", nano_model, "--set", "data.resolution=64")
    assert result.code == 1
    assert "2 of 2 images have no caption" in result.error and "trigger" in result.err


def test_an_output_folder_that_is_a_file(fluxfast, photos, tmp_path, nano_model):
    (tmp_path / "taken").write_text("")
    arguments = ("--model", nano_model, "--set", "data.resolution=64", "--set", "output_dir=taken")
    result = fluxfast("cache", "photos", *arguments)
    assert result.code == 1
    assert "taken" in result.error


def test_ctrl_c_ends_with_a_word(fluxfast, photos, monkeypatch):
    from fluxfast import train

    def interrupted(config, restart):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    result = fluxfast("train", "photos", "--model", "m")
    assert result.code == 130
    assert "goes on where it stopped" in result.err and "Traceback" not in result.err


def test_ctrl_c_promises_what_the_command_keeps(fluxfast, monkeypatch):
    from fluxfast.formats.lora import convert as lora_convert

    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(lora_convert, "convert", interrupted)
    result = fluxfast("convert", "a", "b", "--to", "kohya")
    assert result.code == 130 and result.err == "stopped; nothing was written\n"


# ---------------------------------------------------------------- what the options become


def resolved(monkeypatch, fluxfast, *arguments):
    """The configuration that `train` is called with."""
    from fluxfast import train

    seen = []
    monkeypatch.setattr(train, "train", lambda config, restart: seen.append((config, restart)))
    result = fluxfast("train", *arguments)
    assert result.code == 0, result.err
    return seen[0]


def test_options_and_overrides(monkeypatch, fluxfast, photos):
    given, restart = resolved(
        monkeypatch,
        fluxfast,
        "photos",
        "--model",
        "org/flux",
        "--trigger",
        'öhwx "dog": 😀',
        "--name",
        "007",
        "--encoders",
        "parts",
        "--set",
        "train.steps=7",
        "--set",
        "model.path=last",
    )
    assert given.trigger == 'öhwx "dog": 😀' and given.name == "007"
    assert given.model.path == "last" and given.model.encoders == "parts"
    assert given.train.steps == 7 and not restart
    assert given.data[0].folder == Path("photos")


def test_options_win_over_the_file(monkeypatch, fluxfast, tmp_path):
    config(tmp_path / "c.yaml", name="filed", trigger="filed")
    given, restart = resolved(monkeypatch, fluxfast, "c.yaml", "--name", "asked", "--restart")
    assert (given.name, given.trigger, restart) == ("asked", "filed", True)


@pytest.mark.parametrize(
    "folder, name",
    [
        ("photos (1)", "photos _1_"),
        ("käse", "käse"),
        (".hidden", "hidden"),
        ("---", "lora"),
        ("a&b", "a_b"),
    ],
)
def test_a_folder_of_any_name_gives_a_run_name(monkeypatch, fluxfast, tmp_path, folder, name):
    (tmp_path / folder).mkdir()
    target = tmp_path / folder
    assert resolved(monkeypatch, fluxfast, target, "--model", "m")[0].name == name


# ---------------------------------------------------------------- the commands at work


def test_doctor(fluxfast):
    result = fluxfast("doctor")
    assert result.code == 0, result.out
    for word in ("torch", "python", "CPU", "auto means", "activations", "Hub cache"):
        assert word in result.out
    assert torch.__version__.split("+")[0] in result.out


def test_doctor_tells_what_a_gpu_multiplies(fluxfast, monkeypatch):
    card = SimpleNamespace(name="a card", total_memory=47 << 30, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    said = fluxfast("doctor").out
    assert "a card, 47.0 GiB, sm_89, bf16, int8, fp8" in said
    assert "device cuda, storage int8, compute int8, activations bfloat16" in said


def test_doctor_reports_what_is_missing(fluxfast, monkeypatch):
    from fluxfast.tools import doctor

    monkeypatch.setattr(doctor, "_NEEDED", ("torch", "no-such-library"))
    result = fluxfast("doctor")
    assert result.code == 1
    assert re.search(r"no-such-library\s+MISSING", result.out)


SECOND = """
import sys
from fluxfast.cli import main
try:
    main()
finally:
    late = {"transformers", "diffusers"} & set(sys.modules)
    print("LATE", *sorted(late), file=sys.stderr)
"""


def test_cache_prints_its_folder_and_a_second_run_needs_no_encoder(
    fluxfast, photos, tmp_path, nano_model
):
    arguments = ("cache", "photos", "--model", nano_model, "--set", "data.resolution=64")
    first = fluxfast(*arguments)
    assert (first.code, first.out) == (0, "runs/cache\n"), first.err
    assert "2 samples" in first.err
    before = snapshot(tmp_path / "runs")
    assert before
    # the process is a real one: in this one the encoders' libraries are loaded already
    second = process(*arguments, cwd=tmp_path, code=SECOND)
    assert (second.code, second.out) == (0, "runs/cache\n"), second.err
    assert second.err.splitlines()[-1] == "LATE"
    assert snapshot(tmp_path / "runs") == before


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_train_from_a_folder(fluxfast, photos, tmp_path, nano_model):
    arguments = (
        "train",
        "photos",
        "--model",
        nano_model,
        "--trigger",
        "ohwx",
        "--set",
        "train.steps=2",
        "--set",
        "data.resolution=64",
        "--set",
        "log_every=1",
        "--set",
        "model.storage=fp32",
        "--set",
        "model.compute=fp32",
        "--set",
        "lora.rank=2",
    )
    run = tmp_path / "runs" / "photos"
    first = fluxfast(*arguments)
    assert (first.code, first.out) == (0, "runs/photos/photos.safetensors\n"), first.err
    assert "error" not in first.err and "Traceback" not in first.err
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["trigger"] == "ohwx" and written["train"]["steps"] == 2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["loss"] > 0 for row in rows)
    assert list((run / "tensorboard").iterdir())
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    lora = load_file(run / "photos.safetensors")
    stamp = (run / "checkpoints" / "step-00000002").stat().st_mtime_ns

    again = fluxfast(*arguments)
    assert (again.code, again.out) == (0, first.out), again.err
    assert "2 steps done" in again.err
    assert (run / "checkpoints" / "step-00000002").stat().st_mtime_ns == stamp  # nothing trained
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2

    longer = fluxfast(*arguments, "--set", "train.steps=3")
    assert longer.code == 0 and "resuming" in longer.err and "at step 2" in longer.err
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    finished = snapshot(run)

    fresh = fluxfast(*arguments, "--restart")
    assert fresh.code == 0, fresh.err
    kept = run.with_name("photos.1")
    assert "photos.1" in fresh.err
    assert {path.relative_to(kept): data for path, data in snapshot(kept).items()} == {
        path.relative_to(run): data for path, data in finished.items()
    }
    # the same seed on the same machine: the restarted run is the first one again
    restarted = load_file(run / "photos.safetensors")
    assert restarted.keys() == lora.keys()
    assert all(torch.equal(restarted[name], lora[name]) for name in lora)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_changed_setting_is_refused_on_resume(fluxfast, photos, nano_model):
    arguments = (
        "train",
        "photos",
        "--model",
        nano_model,
        "--set",
        "train.steps=1",
        "--set",
        "data.resolution=64",
        "--set",
        "lora.rank=2",
        "--set",
        "lora.targets=attn",
    )
    assert fluxfast(*arguments).code == 0
    result = fluxfast(*arguments, "--set", "lora.rank=4")
    assert result.code == 2
    assert "lora.rank was 2, is 4" in result.error and "--restart" in result.err


def test_a_file_with_encoders_from_elsewhere(fluxfast, photos, tmp_path, nano_model):
    """The transformer as one BFL file, the rest from the pipeline folder."""
    from fluxfast.model.names import tensor_sources

    with open_base(nano_model) as base:
        tensors = {name: base.read(name).clone() for name in tensor_sources(base.spec)}
    save_file(tensors, tmp_path / "flux.safetensors")
    arguments = ("--encoders", nano_model, "--set", "data.resolution=64")
    result = fluxfast("cache", "photos", "--model", "flux.safetensors", *arguments)
    assert result.code == 0, result.err


def test_a_process_of_its_own(tmp_path):
    """`python -m fluxfast` is the same program: one error on stderr, nothing on stdout."""
    result = process("train", "absent.yaml", cwd=tmp_path)
    assert result.code == 2
    assert result.err == (
        "error: absent.yaml does not exist\n"
        "hint: give a .yaml configuration or a folder of images\n"
    )
    assert result.out == ""
