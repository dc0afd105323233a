"""Model paths and Hub ids: a path first, then the Hub cache, then the Hub; no network here."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, errors

from fluxfast.errors import FluxfastError
from fluxfast.util.hub import ENCODERS, TRANSFORMER, fetch_lora, fetch_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EVERYTHING = (*TRANSFORMER, *ENCODERS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty Hub cache; anything that goes online fails at once."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def snapshot(cache) -> Path:
    """A whole snapshot of org/flux as huggingface_hub lays it out: sharded transformer and T5."""
    repo = cache / "models--org--flux"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    folder = repo / "snapshots" / COMMIT
    for name in ("transformer", "text_encoder_2"):
        write_component(folder / name, ["m-1.safetensors", "m-2.safetensors"])
    for name in ("vae", "text_encoder"):
        write_component(folder / name, ["m.safetensors"], index=False)
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text("{}")
    return folder


def write_component(folder: Path, shards: list[str], index: bool = True) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for shard in shards:
        (folder / shard).write_bytes(b"weights")
    if index:
        weights = {f"tensor{i}": shard for i, shard in enumerate(shards)}
        (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def refused(path: str, components=EVERYTHING) -> FluxfastError:
    with pytest.raises(FluxfastError) as caught:
        fetch_model(path, components)
    assert caught.value.exit_code == 1 and caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


def test_a_whole_snapshot_needs_no_network(snapshot, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = record_downloads(monkeypatch)
    assert fetch_model("org/flux", EVERYTHING) == snapshot
    assert [call["local_files_only"] for call in asked] == [True]


@pytest.mark.parametrize(
    "damage",
    [
        "transformer/m-2.safetensors",
        "transformer/config.json",
        "text_encoder_2/m-1.safetensors",
        "vae/m.safetensors",
        "vae/config.json",
        "tokenizer_2/tokenizer.json",
    ],
)
def test_a_missing_file_is_looked_for_online(snapshot, damage):
    (snapshot / damage).unlink()
    error = refused("org/flux")
    assert "org/flux" in error.message and damage.split("/")[0] in error.message
    assert "connect" in error.hint


def test_what_is_not_asked_for_may_be_missing(snapshot):
    (snapshot / "vae" / "m.safetensors").unlink()
    assert fetch_model("org/flux", TRANSFORMER) == snapshot


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_counts_as_missing(snapshot, content):
    (snapshot / "transformer" / "m.safetensors.index.json").write_text(content)
    assert "transformer" in refused("org/flux").message


def test_a_link_to_a_blob_that_is_gone_counts_as_missing(snapshot):
    shard = snapshot / "vae" / "m.safetensors"
    shard.unlink()
    shard.symlink_to("../../../blobs/gone")
    assert "vae" in refused("org/flux").message


def test_a_download_completes_the_snapshot(snapshot, monkeypatch):
    shard = snapshot / "transformer" / "m-2.safetensors"
    shard.unlink()
    asked = record_downloads(monkeypatch, lambda: (shard.write_bytes(b"x"), str(snapshot))[1])
    assert fetch_model("org/flux", EVERYTHING) == snapshot
    assert [call["local_files_only"] for call in asked] == [True, False]
    patterns = asked[-1]["allow_patterns"]
    assert {f"{name}/*" for name in EVERYTHING} <= set(patterns)
    assert not any("*" in pattern.split("/")[0] for pattern in patterns)  # not the whole repository


def test_nothing_in_the_cache_and_offline():
    error = refused("black-forest-labs/FLUX.1-dev")
    assert "black-forest-labs/FLUX.1-dev" in error.message
    assert "could not be downloaded" in error.message and "connect" in error.hint


class ClientError(Exception):
    """What requests, httpx or hf_xet may raise: no OSError, no class that we could name."""


def http_error(kind, status: int):
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind("Access to the model is restricted.\n\nSecond line.", response=response)


@pytest.mark.parametrize(
    "failure, message, hint",
    [
        (http_error(errors.GatedRepoError, 403), "gated: its license", "org/other .*auth login"),
        (http_error(errors.RepositoryNotFoundError, 404), "neither a path", "spelling.*auth login"),
        (http_error(errors.HfHubHTTPError, 500), "could not be downloaded", "connect"),
        (ClientError("proxy\nsays no"), "could not be downloaded: proxy says no", "connect"),
        (ClientError(), "could not be downloaded: ClientError", "connect"),
        (OSError(28, "No space left on device"), "could not be downloaded", "connect"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_any_failure_of_the_download_is_one_message(monkeypatch, failure, message, hint):
    record_downloads(monkeypatch, failure)
    error = refused("org/other")
    assert message in error.message and re.search(hint, error.hint)


def record_downloads(monkeypatch, online=None) -> list[dict]:
    """Returns the calls of snapshot_download; one that goes online raises or calls `online`."""
    import huggingface_hub

    calls = []
    real = huggingface_hub.snapshot_download

    def download(repo, *, allow_patterns, local_files_only=False):
        calls.append({"allow_patterns": allow_patterns, "local_files_only": local_files_only})
        if local_files_only:
            return real(repo, allow_patterns=allow_patterns, local_files_only=True)
        if isinstance(online, Exception):
            raise online
        return online()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_a_local_path_wins_over_the_hub(snapshot, tmp_path, monkeypatch):
    (tmp_path / "org" / "flux").mkdir(parents=True)
    assert fetch_model("org/flux", EVERYTHING) == Path("org/flux")
    file = tmp_path / "flux.safetensors"
    file.write_bytes(b"")
    assert fetch_model(str(file), TRANSFORMER) == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch_model("~/org/flux", EVERYTHING) == tmp_path / "org" / "flux"


@pytest.mark.parametrize(
    "suffix", ["safetensors", "sft", "gguf", "ckpt", "pt", "bin", "SAFETENSORS"]
)
def test_no_hub_id_ends_as_a_file_does(suffix, tmp_path, monkeypatch):
    """A file that is not there is said to be missing, without a look at the Hub."""
    asked = record_downloads(monkeypatch)
    path = f"models/flux1-dev.{suffix}"
    error = refused(path)
    assert error.message == f"the file {path} does not exist"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"ae.{suffix}").write_bytes(b"")  # no more like it than by its suffix
    assert "did you mean" not in refused(path).hint
    (tmp_path / "models" / f"flux1-dev-fp8.{suffix}").write_bytes(b"")
    assert refused(path).hint == f"did you mean models/flux1-dev-fp8.{suffix}?"
    with pytest.raises(FluxfastError, match=f"the LoRA {path} does not exist"):
        fetch_lora(path)
    assert not asked


@pytest.mark.parametrize("name", ["city96/FLUX.1-dev-gguf", "org/a.v2", "org/safetensors"])
def test_what_only_looks_like_a_file_is_a_hub_id(name):
    error = refused(name)
    assert "no path here" in error.message and "could not be downloaded" in error.message


NEITHER = "/no/such/model,no-slash,a/b/c,./model,../model,~nobody-here/x,~/x,org/name.git,org/a--b"
NEITHER += ",https://huggingface.co/org/name,a b/c,x\0y"


@pytest.mark.parametrize("path", NEITHER.split(","))
def test_what_is_neither_path_nor_hub_id(path, monkeypatch):
    monkeypatch.setenv("HOME", "/no/such/home")
    error = refused(path)
    assert "does not exist" in error.message and path in error.message
    assert "black-forest-labs/FLUX.1-dev" in error.hint


def test_a_lora_by_its_path_or_from_the_cache(cache, tmp_path):
    """A cached repository without a LoRA file is not enough."""
    (tmp_path / "mine.safetensors").write_bytes(b"weights")
    assert fetch_lora("mine.safetensors") == Path("mine.safetensors")
    folder = cache / "models--org--adapter" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text(COMMIT)
    with pytest.raises(FluxfastError, match="org/adapter"):
        fetch_lora("org/adapter")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    assert fetch_lora("org/adapter") == folder
    for missing in ("none.safetensors", "a/none.safetensors"):
        with pytest.raises(FluxfastError, match="does not exist"):
            fetch_lora(missing)
