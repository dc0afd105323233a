"""The search space and the compiler's verdicts on it: which tiles may be timed on a card."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.tune import tiles as tune_tiles
from bench.tune.space import KERNELS, Kernel, groups, named_tile, space, tile_name
from bench.tune.tiles import DIED, KEPT, _modes, heading_of, kept, load
from bench.twin import readings
from bench.twin.driver import SHARED_LIMIT
from fluxfast.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DENSE = Kernel("lora_gemm", "dense", "half")
NAMES = ["64x64x32.4w2", "64x64x32.4w3", "64x64x32.4w4"]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_space_of_every_kernel(kernel):
    tiles = space(kernel, 89)
    assert 8 <= len(tiles) == len(set(tiles)) <= 90
    assert len(space(kernel, 90)) >= len(tiles)  # it has more shared memory
    for tile in tiles:
        name = tile_name(tile, with_group=False)
        assert named_tile(kernel, name) == tile == named_tile(kernel, tile_name(tile))
        if kernel.op.startswith(("lora_gemm", "gemm_8bit")):
            assert tile.group_m == groups(kernel)[0]
            assert tile.block_m * tile.block_n <= 128 * 32 * tile.num_warps
            step = (tile.block_m + tile.block_n) * tile.block_k
            step *= 2 if kernel.dtype == "half" else 1
            assert kernel.storage == "nf4" or (tile.num_stages - 1) * step <= SHARED_LIMIT[89]


@pytest.mark.parametrize("name", ["128x128.4w3", "128x128x64", "128x128x64.4w3g", "x"])
def test_other_tile_names_are_refused(name):
    with pytest.raises(ValueError, match="no name of a tile"):
        named_tile(DENSE, name)


FINE = {"registers": 200, "stack": 0, "local": 0, "shared": SHARED_LIMIT[89], "slow": 0}


@pytest.mark.parametrize(
    ("change", "heading"),
    [
        ({}, KEPT),
        ({"stack": 8}, "spills"),
        ({"shared": SHARED_LIMIT[89] + 1}, "too much shared memory"),
        ({"slow": 1}, "no tensor cores"),
        ({"error": "no such layout"}, "does not compile"),
    ],
)
def test_a_tile_is_kept_where_nothing_is_wrong_with_any_launch(change, heading, monkeypatch):
    costs = {"first": FINE, "last": FINE | change}
    monkeypatch.setattr(tune_tiles, "launched_with", lambda *_: list(costs))
    monkeypatch.setattr(readings, "reading_of", costs.__getitem__)
    assert heading_of(DENSE, NAMES[0], 89) == heading


@pytest.mark.parametrize(("arch", "has_fp8"), [(80, False), (89, True)])
def test_products_that_a_card_does_not_have_are_left_out(arch, has_fp8):
    modes = _modes(Kernel("lora_skinny_8bit", "dense", "half"), arch)
    assert modes and any("fp8" in mode for mode in modes) == has_fp8


def verdict(kernel, name, arch):
    return {NAMES[0]: KEPT, NAMES[1]: "spills"}.get(name, "does not compile")


@pytest.fixture
def candidates(tmp_path, monkeypatch):
    """Lists of three tiles for each kernel, as `judge` has them."""
    tiles = [named_tile(DENSE, name) for name in NAMES]
    monkeypatch.setattr(tune_tiles, "space", lambda kernel, arch: tiles)

    def run(kernels=(DENSE,), judge=verdict, arch=89, budget_s=None, workers=1):
        monkeypatch.setattr(tune_tiles, "heading_of", judge)
        path = tmp_path / f"sm_{arch}.json"
        return tune_tiles.candidates(arch, kernels, path, budget_s, workers)

    return run


def test_the_list_holds_every_tile_under_its_verdict(candidates, tmp_path):
    path, other = tmp_path / "sm_89.json", Kernel("gemm_8bit", "dense", "int8")
    found = candidates([other, DENSE], workers=2)
    table = json.loads(path.read_text())
    assert (table["triton"], found) == load(path)
    assert kept(found, DENSE) == [named_tile(DENSE, NAMES[0])]
    assert f'"{KEPT}": ["{NAMES[0]}"]' in path.read_text()
    assert table["kernels"][str(DENSE)]["spills"] == [NAMES[1]] and table["arch"] == 89
    assert list(table["kernels"]) == [str(DENSE), str(other)]  # whatever came first


def test_a_list_is_resumed_but_not_that_of_another_triton(candidates, tmp_path):
    path = tmp_path / "sm_89.json"
    assert candidates(budget_s=0.0) == {}
    candidates()
    table = json.loads(path.read_text())
    del table["kernels"][str(DENSE)]["spills"]
    path.write_text(json.dumps(table))
    again = candidates(judge=lambda *_: "asked")
    assert again[str(DENSE)] == {NAMES[0]: KEPT, NAMES[1]: "asked", NAMES[2]: "does not compile"}
    path.write_text(path.read_text().replace(table["triton"], "3.0.0"))
    assert set(candidates(judge=lambda *_: "asked")[str(DENSE)].values()) == {"asked"}


def test_a_compiler_that_dies_refuses_its_tile_alone(candidates):
    def dies(kernel, name, arch):
        if name == NAMES[1]:
            os._exit(139)
        return KEPT

    found = candidates(judge=dies, workers=3)
    assert found[str(DENSE)] == {NAMES[0]: KEPT, NAMES[1]: DIED, NAMES[2]: KEPT}


def test_no_tile_is_begun_beyond_the_budget(candidates):
    found = candidates(judge=lambda *_: (time.sleep(0.4), KEPT)[1], budget_s=0.2)
    assert list(found[str(DENSE)]) == NAMES[:1]


def test_fp8_is_left_out_before_sm_89(candidates):
    kernels = [Kernel("gemm_8bit", "dense", kind) for kind in ("int8", "fp8")]
    assert [len(candidates(kernels, arch=arch)) for arch in (80, 89)] == [1, 2]


def test_a_file_that_is_no_list_is_refused(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"no list of tiles[\s\S]*hint"):
        load(path)


@pytest.mark.slow
def test_two_tiles_are_compiled_for_a_4090(tmp_path):
    """The larger one spills there (as `bench/LOG.md` has it of 4 warps)."""
    path, names = tmp_path / "sm_89.json", ["64x64x32.4w2", "128x128x64.4w3"]
    script = (
        "from bench.tune import cli, space, tiles\n"
        "for kernel in space.KERNELS:\n"
        "    assert tiles.launched_with(kernel, space.space(kernel, 89)[0], 89), kernel\n"
        "tiles.space = lambda kernel, arch: "
        f"[tiles.named_tile(kernel, name) for name in {names}]\n"
        f"cli.main(['candidates', '--arch', '89', '--op', '{DENSE}', '--out', {str(path)!r}])\n"
    )
    # a process that interprets cannot compile
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert load(path)[1][str(DENSE)] == {names[0]: KEPT, names[1]: "spills"}
    assert done.stdout.splitlines()[1].split() == [str(DENSE), "1", "2"]
