"""The command line as a user meets it: exit codes, one clear message, what lands where."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small import CommandResult, noise_pictures

from fluxfast import cli
from fluxfast.formats.base import load
from fluxfast.formats.base.reader import open_base
from fluxfast.run import preflight

ROOT = Path(__file__).resolve().parents[2]
COLOR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def process(*arguments, cwd: Path, code: str | None = None, **env) -> CommandResult:
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
    return CommandResult(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return noise_pictures(folder, 2, "a square", sizes=((64, 64), (80, 64)))


def config(path: Path, **changes) -> Path:
    raw = {"model": {"path": "/no/such/model"}, "data": {"folder": "photos"}, **changes}
    path.write_text(yaml.safe_dump(raw))
    return path


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


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
        "fluxfast.util.files",
        "fluxfast.util.platform",
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
    options = {"--set", "--model", "--trigger", "--restart", "--name", "--encoders"}
    assert options <= set(fluxfast("train", "--help").out.split())


def test_no_color_is_honored(tmp_path):
    colored = process("--help", cwd=tmp_path, FORCE_COLOR="1")
    plain = process("--help", cwd=tmp_path, FORCE_COLOR="1", NO_COLOR="1")
    assert COLOR.search(colored.out)
    assert plain.code == 0 and not COLOR.search(plain.out)
    assert "train" in plain.out


# ---------------------------------------------------------------- exit code 2: the call is wrong


def test_a_call_that_typer_refuses(fluxfast):
    for arguments in ((), ("train",), ("trian",), ("train", "x", "--no-such-option")):
        assert fluxfast(*arguments).code == 2


@pytest.mark.parametrize("command", ["train", "cache", "check"])
def test_a_target_that_cannot_be_used(fluxfast, photos, tmp_path, command):
    result = fluxfast(command, "absent.yaml")
    assert result.code == 2
    assert "absent.yaml does not exist" in result.error and "hint: " in result.err
    result = fluxfast(command, "photos")
    assert result.code == 2
    assert "needs a model" in result.error and "--model" in result.err
    # refused before anything is looked for, the model too
    config(tmp_path / "c.yaml", model={"path": "absent", "storage": "int8", "compute": "fp8"})
    result = fluxfast(command, "c.yaml", *sets("device=cpu"))
    assert result.code == 2 and "storage int8 and compute fp8" in result.error
    assert "compute: int8, or storage: nf4" in result.err  # of every command, in its own spelling
    assert not (tmp_path / "runs" / "lora").exists()


@pytest.mark.parametrize(
    "content, override, part",
    [
        ("a: b: c", "train.steps=5", "c.yaml is not valid YAML"),
        ("model: {path: m}", "train.steps=5", "c.yaml: data is missing"),
        ("model: {path: m}\ndata: {folder: f}", "train.stesp=5", "did you mean 'train.steps'"),
        ("model: {path: m}\ndata: {folder: f}", "train.steps", "takes KEY=VALUE"),
    ],
)
def test_a_bad_configuration(fluxfast, tmp_path, content, override, part):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    result = fluxfast("train", "c.yaml", "--set", override)
    assert result.code == 2 and part in result.error
    assert list(tmp_path.iterdir()) == [file]


def test_a_gpu_that_is_not_there(fluxfast, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config(tmp_path / "c.yaml", device="cuda:7")
    result = fluxfast("train", "c.yaml")
    assert result.code == 2 and "cuda:7" in result.error


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
        ({"*.linear1": "rotate"}, "compute: int8"),
    ],
)
def test_layers_that_the_model_has_not(fluxfast, photos, nano_model, layers, part):
    options = sets("data.resolution=64", "model.compute=fp32", f"model.layers={json.dumps(layers)}")
    result = fluxfast("train", "photos", "--model", nano_model, *options, *sets("device=cpu"))
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
    (tmp_path / "parts").mkdir()
    arguments = ("train", "photos", "--model", file, "--encoders", "parts")
    result = fluxfast(*arguments)  # the base is looked at before what else is missing
    assert result.code == 2 and f"cannot read {file}: it is a web page" in result.error
    for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (tmp_path / "parts" / name).mkdir()
        (tmp_path / "parts" / name / "config.json").write_text("{}")
    result = fluxfast(*arguments)
    assert result.code == 2 and f"cannot read {file}" in result.error


def test_a_broken_image(fluxfast, photos, nano_model):
    (photos / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    arguments = ("cache", "photos", "--model", nano_model, *sets("data.resolution=64"))
    result = fluxfast(*arguments, *sets("data.strict=true"))
    assert result.code == 1 and "0.png" in result.error
    result = fluxfast(*arguments)
    assert result.code == 0 and "\nphotos: 1 of 2 pictures, in 1 bucket: " in result.err
    (skipped,) = [line for line in result.err.splitlines() if "skipped" in line]
    assert skipped.startswith("skipped: photos/0.png is not a")
    assert "\n  left out: 1 that cannot be used, named above (strict: true " in result.err


def test_an_output_folder_that_is_a_file(fluxfast, photos, tmp_path, nano_model):
    (tmp_path / "taken").write_text("")
    options = sets("data.resolution=64", "output_dir=taken")
    result = fluxfast("cache", "photos", "--model", nano_model, *options)
    assert result.code == 1 and "taken" in result.error


@pytest.mark.parametrize(
    "function, arguments, word",
    [
        ("fluxfast.train.train", ["train", "photos", "--model", "m"], "goes on where it stopped"),
        (
            "fluxfast.formats.lora.convert.convert",
            ["convert", "a", "b", "--to", "kohya"],
            "nothing was",
        ),
    ],
)
def test_ctrl_c_says_what_is_kept(fluxfast, photos, monkeypatch, function, arguments, word):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(function, interrupted)
    result = fluxfast(*arguments)
    assert result.code == 130
    assert word in result.err and "Traceback" not in result.err


@pytest.mark.parametrize(
    "function, arguments",
    [
        ("fluxfast.train.train", ["train", "photos", "--model", "m"]),
        ("fluxfast.data.prepare.prepare", ["cache", "photos", "--model", "m"]),
        ("fluxfast.tools.check.check", ["check", "photos", "--model", "m"]),
        ("fluxfast.tools.generate.generate", ["sample", "--model", "m", "--prompt", "x"]),
        ("fluxfast.formats.base.quantize.quantize", ["quantize", ".", "a.safetensors"]),
    ],
)
@pytest.mark.parametrize(
    "error, word, cure",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried Of the allocated memory 2"),
            "memory. Tried",
            "nvidia-smi",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "ALLOC_FAILED", "nvidia-smi"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "CPUAll", "machine's own"),
        (MemoryError(), "full: out of memory", "machine's own"),
    ],
)
@pytest.mark.grid(8)
def test_full_memory_ends_a_command_with_a_cure(
    fluxfast, photos, monkeypatch, function, arguments, error, word, cure
):
    monkeypatch.setattr(function, Mock(side_effect=error))
    monkeypatch.setattr("fluxfast.util.hub.fetch_model", lambda source, parts: Path(source))
    result = fluxfast(*arguments)
    assert result.code == 1 and word in result.error and "memory is full: " in result.error
    assert cure in result.err and "allocated" not in result.err


def test_any_other_error_is_not_hidden(fluxfast, photos, monkeypatch):
    monkeypatch.setattr("fluxfast.train.train", Mock(side_effect=RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        fluxfast("train", "photos", "--model", "m")


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
    options = ["--trigger", 'öhwx "dog": 😀', "--name", "007", "--encoders", "parts"]
    options += sets("train.steps=7", "model.path=last")
    settings, restart = resolved(monkeypatch, fluxfast, "photos", "--model", "org/flux", *options)
    assert settings.trigger == 'öhwx "dog": 😀' and settings.name == "007"
    assert settings.model.path == "last" and settings.model.encoders == "parts"
    assert settings.train.steps == 7 and not restart
    assert settings.data[0].folder == Path("photos")


def test_every_path_of_the_command_line_knows_the_home_folder(
    monkeypatch, fluxfast, photos, nano_model, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    config(tmp_path / "c.yaml", name="filed")
    assert resolved(monkeypatch, fluxfast, "~/c.yaml")[0].name == "filed"
    settings, _ = resolved(monkeypatch, fluxfast, "~/photos", "--model", "m")
    assert settings.data[0].folder == photos and settings.name == "photos"
    (tmp_path / "nano").symlink_to(nano_model)
    assert fluxfast("inspect", "~/nano").code == 0
    plans = [
        fluxfast("plan", "~/c.yaml", *sets(f"model.path={p}")).out for p in ("~/nano", nano_model)
    ]
    assert plans[0] == plans[1] != fluxfast("plan", "~/c.yaml").out
    for lora in ("~/absent.safetensors", "~nobody-here/absent.safetensors"):
        found = lora.replace("~/", f"{tmp_path}/")
        assert (
            f"cannot read {found}: No such file"
            in fluxfast("convert", lora, "~/b", "--to", "kohya").err
        )
    assert fluxfast("quantize", "~/nano", "~/q.safetensors").out == f"{tmp_path}/q.safetensors\n"
    drawn = fluxfast(
        *("sample", "--model=~/nano", "--prompt=a", "--width=32", "--height=32", "--steps=1"),
        *("--out=~/drawn", "--layers=~/no.yaml"),
    )
    assert f"cannot read model.layers {tmp_path}/no.yaml" in drawn.err
    assert not (Path.cwd() / "~").exists()


def test_options_win_over_the_file(monkeypatch, fluxfast, tmp_path):
    config(tmp_path / "c.yaml", name="filed", trigger="filed")
    settings, restart = resolved(monkeypatch, fluxfast, "c.yaml", "--name", "asked", "--restart")
    assert (settings.name, settings.trigger, restart) == ("asked", "filed", True)


@pytest.mark.parametrize(
    "folder, name",
    [("photos (1)", "photos _1_"), ("käse", "käse"), (".hidden", "hidden"), ("---", "lora")],
)
def test_a_folder_of_any_name_gives_a_run_name(monkeypatch, fluxfast, tmp_path, folder, name):
    (tmp_path / folder).mkdir()
    target = tmp_path / folder
    assert resolved(monkeypatch, fluxfast, target, "--model", "m")[0].name == name


# ---------------------------------------------------------------- the commands at work


def test_doctor(fluxfast, monkeypatch):
    from fluxfast.tools import doctor

    result = fluxfast("doctor")
    assert result.code == 0, result.out
    for word in ("torch", "python", "CPU", "auto means", "activations", "Hub cache"):
        assert word in result.out
    assert torch.__version__.split("+")[0] in result.out
    monkeypatch.setattr(doctor, "_NEEDED", ("torch", "no-such-library"))
    result = fluxfast("doctor")
    assert result.code == 1
    assert re.search(r"no-such-library\s+MISSING", result.out)


@pytest.fixture
def gpu(monkeypatch):
    """What torch says of a GPU."""
    card = SimpleNamespace(name="a card", total_memory=47 << 30, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(load, "broken_compiler", lambda device: None)


def test_doctor_names_the_8_bit_formats_of_a_gpu(fluxfast, gpu):
    code, out, _ = fluxfast("doctor")
    assert code == 0 and "a card, 47.0 GiB, sm_89, bf16, int8, fp8" in out
    assert "device cuda, storage int8, compute int8, activations bfloat16" in out


def test_a_gpu_without_triton_or_nvrtc_is_refused_before_any_work(
    fluxfast, gpu, monkeypatch, photos, nano_model
):
    """Encoding and loading went through before, and the first kernel or timestep failed."""
    train = "train", "photos", "--model", nano_model
    with monkeypatch.context() as patch:
        patch.setattr(load.backend, "HAS_TRITON", False)
        code, out, _ = fluxfast("doctor")
        assert code == 1 and "MISSING: a GPU's kernels need it: `pip install triton" in out
        code, _, err = fluxfast(*train)
        assert code == 2 and "Triton is not here\nhint: pip install triton" in err, err
    fault = "NVRTC does not work: nvrtc: error: failed to open libnvrtc-builtins.so.13.0", "cure"
    for module in (load, preflight):
        monkeypatch.setattr(module, "broken_compiler", lambda device: fault)
    code, out, _ = fluxfast("doctor")
    assert code == 1 and f"MISSING: {fault[0]}; cure" in out
    code, _, err = fluxfast(*train)
    assert code == 1 and f"nothing can be trained on this GPU: {fault[0]}\nhint: cure" in err, err


@pytest.mark.parametrize(
    ("name", "at", "cure"),
    [("Triton", "quantize_rows", "C compiler"), ("NVRTC", "ndtri", "install torch anew")],
)
def test_a_compiler_that_does_not_work_is_named_with_its_cure(monkeypatch, name, at, cure):
    def fails(*_):
        raise RuntimeError(f"{at} cannot be compiled\nat length")

    full = torch.full
    monkeypatch.setattr(torch, "full", lambda shape, value, device: full(shape, value))
    cuda = torch.device("cuda", 0)
    assert load.broken_compiler(cuda) is None and load.broken_compiler(torch.device("cpu")) is None
    monkeypatch.setattr(load, at, fails)
    what, how = load.broken_compiler(cuda)
    assert what == f"{name} does not work: {at} cannot be compiled" and cure in how


def test_a_cpu_beside_a_gpu_is_noted_with_the_reason(fluxfast, monkeypatch, caplog):
    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    reason = "The NVIDIA driver on your system is too old (found version 11040)."
    monkeypatch.setattr(load.shutil, "which", lambda name: f"/usr/bin/{name}")
    for cuda, words in ((None, "this torch is built for CPUs alone"), ("13.0", reason)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "init", too_old)
        load._note_cpu.cache_clear()
        for _ in range(2):
            assert load.resolve_device("auto").type == "cpu"
        assert caplog.text.count(f"note: device auto is the CPU: {words}") == 1
        assert f"{words}; training runs on the CPU" in fluxfast("doctor").out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert load.why_no_gpu() is None


def test_cache_prints_its_folder_and_a_second_run_needs_no_encoder(
    fluxfast, photos, tmp_path, nano_model
):
    arguments = ("cache", "photos", "--model", nano_model, "--set", "data.resolution=64")
    first = fluxfast(*arguments)
    assert (first.code, first.out) == (0, "runs/cache\n"), first.err
    assert "\nphotos: 2 of 2 pictures, in 1 bucket: 64x64 (2)\n" in first.err
    before = snapshot(tmp_path / "runs")
    assert before
    # in this process the encoders' libraries are loaded already
    second = process(*arguments, cwd=tmp_path, code=PROBE)
    assert (second.code, second.out) == (0, "runs/cache\n"), second.err
    loaded = set(second.err.split("LOADED", 1)[1].split())
    assert "torch" in loaded and not loaded & {"transformers", "diffusers"}
    assert snapshot(tmp_path / "runs") == before


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_train_from_a_folder(fluxfast, photos, tmp_path, nano_model):
    options = sets("train.steps=2", "data.resolution=64", "log_every=1", "lora.rank=2")
    options += sets("model.storage=fp32", "model.compute=fp32")
    arguments = ("train", "photos", "--model", nano_model, "--trigger", "ohwx", *options)
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

    longer = fluxfast(*arguments, *sets("train.steps=3"))
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
    options = sets("train.steps=1", "data.resolution=64", "lora.rank=2", "lora.targets=attn")
    arguments = ("train", "photos", "--model", nano_model, *options)
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


@pytest.mark.parametrize(
    "encoding, shown",
    [
        ("ascii", "Z\\xe9 \\u0394 \\u732b \\U0001f408"),
        ("cp1252", "Zé \\u0394 \\u732b \\U0001f408"),
        ("cp932", "Z\\xe9 Δ 猫 \\U0001f408"),
        ("utf-8", "Zé Δ 猫 🐈"),
    ],
)
def test_every_letter_comes_out_in_every_encoding(monkeypatch, encoding, shown):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def app():
        logging.getLogger("fluxfast").warning("Zé Δ 猫 🐈")
        print("Zé Δ 猫 🐈")
        raise SystemExit(0)

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0 and sys.stdout is out
    for stream in (out, err):
        assert stream.buffer.getvalue().decode(encoding) == f"{shown}\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    "stream, broken, code",
    [
        ("stdout", "gone", 0),  # `| head -1`
        ("stdout", "closed", 0),  # `>&-`
        ("stdout", "full", 1),
        ("stderr", "gone", 0),
        ("stderr", "closed", 0),
        ("stderr", "full", 0),  # a log file on a full disk ends no run
    ],
)
def test_a_lost_stream_ends_no_run(monkeypatch, capfd, stream, broken, code):
    if broken == "gone":
        end, number = os.pipe()
        os.close(end)
        file = os.fdopen(number, "w")
    else:
        file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w") if broken == "full" else None
    monkeypatch.setattr(sys, stream, file)
    done = []

    def app():
        for _ in range(3):
            logging.getLogger("fluxfast").warning("step")
            print("out", flush=True)
            print("err", file=sys.stderr, flush=True)
        done.append(True)
        raise SystemExit(0)

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert done and stop.value.code == code
    if file:
        file.close()  # as Python does at the end: what it could not write must be gone
    seen = "".join(capfd.readouterr())
    assert ("error: stdout: No space left on device" in seen) == bool(code)


def test_a_process_of_its_own(tmp_path):
    """`python -m fluxfast` is the same program: one error on stderr, nothing on stdout."""
    result = process("train", "absent.yaml", cwd=tmp_path)
    assert result.code == 2
    assert result.err == (
        "error: absent.yaml does not exist\n"
        "hint: give a .yaml configuration or a folder of images\n"
    )
    assert result.out == ""
