"""The pages show what the rows say: which rows count, in which table, on which chart."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import quantize, rows, timing
from bench.report import charts, plan_table, step_chart, technique_table
from bench.report import cli as report
from bench.step.settings import Cycle, Settings
from bench.step.table import row_settings
from fluxfast.memory.planner import saved_bytes
from fluxfast.memory.planner.plan import NODES
from fluxfast.model.spec import DEV

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path(__file__).with_name("step_page.md")
LOG = (ROOT / "bench" / "LOG.md").read_text(encoding="utf-8")


SETTINGS = Settings(DEV, "cuda", torch.bfloat16, [], 512, 16, rounds=9, warmup=3, apart=True)
H100 = {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3", "driver": "580.1"}
VERSIONS = {"torch": "2.11.0", "commit": "0123456789", "date": "today"}
CPU = {
    "device": "cpu",
    "device_name": "a CPU",
    "threads": 2,
    "double_blocks": 1,
    "single_blocks": 2,
    "pixels": 256,
    "image_tokens": 256,
    "interleaved": True,
}
STOCK = {"setting": "stock", "lora_targets": "all", "ema": True, "optimizer": "AdamW8bit"}


def row(name: str = "fluxfast-nf4", median_ms: float | None = 100.0, **changes) -> dict:
    """A row of bench.step: full-size FLUX.1-dev on an H100 but for the changes."""
    result = timing.Result(name, status="failed", peak_memory_bytes=13 * 2**30)
    if median_ms is not None:
        times = {"median_ms": median_ms, "p10_ms": median_ms - 5, "p90_ms": median_ms + 9}
        result = replace(result, status="ok", ratio=0.5, **times)
    settings = row_settings(SETTINGS, name, Cycle((512,), 1))
    more = {"rounds": 9, "saved_bytes": 5 * 2**30}
    return timing.row(result, **settings) | H100 | VERSIONS | more | changes


@pytest.fixture
def write(tmp_path):
    """Appends rows to a file of the folder."""

    def append(name: str, *written: dict) -> None:
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in written)

    return append


def lines(text: str) -> list[list[str]]:
    """The cells of a Markdown table's rows, without its head and rule."""
    found = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[1:]]


# ---------------------------------------------------------------- steps


def test_the_page_of_rows(write, tmp_path):
    """step_page.md: a table for each device, setting and work, GPUs first and of CPUs the last;
    the newest row counts but not one that was never tried; captions hold for all of their rows."""
    newer = CPU | {"device_name": "a newer CPU"}
    write("step-cpu.jsonl", row(**CPU), row("diffusers-nf4", **newer))
    write("step-cpu.jsonl", row(**newer | {"commit": "abcdef012345"}))
    assert step_chart.NO_GPU in step_chart.block(tmp_path)
    write(
        "step-cuda.jsonl",
        row("diffusers-nf4", ratio=1.0),
        row("diffusers-nf4", None, status="skipped", reason="no module named peft"),
        row(ratio=None, peak_memory_bytes=None, saved_bytes=None),
        row("fluxfast-nf4-fp8"),
        row("fluxfast-nf4-fp8", None, status="gate failed", reason="loss|norm"),
        row("fluxfast-dense", None, status="out of time", reason="60 s"),
        row(
            "fluxfast-int8-int8-trainer", 500.0, batch=4, mfu=0.314, launches=37, image_tokens=4096
        ),
        row(rank=64),
        row(lora_targets="all", device_name="NVIDIA GeForce RTX 4090"),
        row(median_ms=900.0, memory_cap_gib=24.0),
        row(median_ms=None, memory_cap_gib=12.0, status="out of memory", reason="no room"),
        row(median_ms=750.0, **STOCK, pixels=None, image_tokens=None, mix=[512, 768, 1024]),
        row(median_ms=700.0, **STOCK),
    )
    assert step_chart.block(tmp_path) + "\n" == PAGE.read_text(encoding="utf-8")


def test_a_gpu_that_timed_nothing_is_shown_and_is_no_claim(write, tmp_path):
    write("step-cuda.jsonl", row(median_ms=None, status="out of memory", reason="2 GiB"))
    write("step-cpu.jsonl", row(**CPU))
    text = step_chart.block(tmp_path)
    assert "| fluxfast | 512 | 1 | out of memory: 2 GiB |" in text
    assert "step-cpu.svg" in text and step_chart.NO_GPU in text


def test_the_chart_has_the_largest_image_of_the_smallest_batch(write, tmp_path):
    shown = [row("diffusers-nf4", 900.0, pixels=1024), row(median_ms=800.0, pixels=1024)]
    other = [row(), row(batch=4, pixels=1024), row("fluxfast-nf4-fp8", None, pixels=1024)]
    write("step-cuda.jsonl", *other, *shown)
    assert step_chart.charted(step_chart.tables(tmp_path)) == shown
    path = tmp_path / "step-cuda.svg"
    assert not charts.is_of(path, shown)
    step_chart.draw(shown, path)
    assert charts.is_of(path, shown) and not charts.is_of(path, [*shown, row()])
    first = path.read_bytes()
    step_chart.draw(shown, path)
    assert path.read_bytes() == first


# ---------------------------------------------------------------- techniques


def gains(folder: Path) -> list[str]:
    return [cells[3] for cells in lines(technique_table.block(folder))]


def test_without_rows_nothing_is_called_measured(tmp_path):
    found = gains(tmp_path)
    assert found.count("not measured") == 7 and not any("measured:" in cell for cell in found)
    assert sum(cell.startswith("counted: ") for cell in found) == 3 == len(found) - 7


def test_what_is_exact_changes_nothing():
    for one in technique_table.TECHNIQUES:
        assert one.kind in technique_table.CLASSES
        assert (one.kind == "exact") == one.changes.startswith("nothing"), one


def kernel_row(name: str, op: str, median_ms: float, **changes) -> dict:
    return {
        "name": name,
        "op": op,
        "median_ms": median_ms,
        "status": "ok",
        "storage": "nf4",
        "products": "bfloat16",
        "compute": "bfloat16",
        "direction": "forward+backward",
        "pixels": 1024,
        "batch": 1,
        "device_name": "a GPU",
    } | changes


def test_gains_are_read_from_rows(write, tmp_path):
    write(
        "step-cuda.jsonl",
        row("diffusers-nf4", 400.0, saved_bytes=900 * 2**20),
        row("diffusers-nf4-checkpoint", 500.0),
        row(median_ms=300.0, saved_bytes=450 * 2**20, launches=3000),
        row("fluxfast-nf4-int8", 210.0),
        row("fluxfast-nf4-trainer", 290.0, launches=41),
    )
    # of the smallest batch, the largest image; whole; over NF4 with matmuls in bf16
    others = [{"direction": "forward"}, {"products": "int8"}, {"storage": "bfloat16"}]
    write(
        "kernels-cuda.jsonl",
        *(kernel_row(name, "lora_linear", ms) for name, ms in (("fluxfast", 3.0), ("eager", 4.0))),
        *(kernel_row(name, "lora_linear", 9.0, batch=4) for name in ("fluxfast", "eager")),
        *(kernel_row(name, "lora_linear", 9.0, pixels=512) for name in ("fluxfast", "eager")),
        *(kernel_row("fluxfast", "lora_linear", 9.0, **other) for other in others),
        kernel_row("fluxfast", "lora_linear", 9.0, status="failed"),
        kernel_row("fluxfast", "qk_norm_rope_attention", 1.0, storage=None),
        kernel_row("eager", "qk_norm_rope_attention", 4.0, storage=None),
        kernel_row("fluxfast", "gelu_lora_linear", 1.0),  # beside no eager
    )
    decode = {"what": "decode", "device_name": "a CPU"}
    write(
        quantize.ROWS.name,
        {"name": quantize.OURS, "ratio": 0.9} | decode,
        {"name": quantize.OURS, "ratio": 0.25} | decode,
        {"name": quantize.THEIRS, "ratio": 1.0} | decode,
        {"name": quantize.OURS, "ratio": 0.01} | decode | {"what": "quantize"},
    )
    for name in ("quality.jsonl", "activations.jsonl"):
        shutil.copy(report.RESULTS / name, tmp_path)
    found = gains(tmp_path)
    assert found[0] == (
        "measured: 450 MiB kept for backward where diffusers + peft keeps 900, and takes 1.25 "
        "times as long with checkpointing (NVIDIA H100 80GB HBM3)"
    )
    assert found[1] == "not measured"
    assert found[2] == "measured: qk_norm_rope_attention takes 0.25 (a GPU) of eager PyTorch's time"
    assert found[3] == "measured: lora_linear takes 0.75 (a GPU) of eager PyTorch's time"
    assert found[4] == "measured: decoding takes 0.25 of bitsandbytes' time (a CPU)"
    assert found[5].startswith("measured: int8 takes 0.70 of the time of bf16 matmuls (NVIDIA")
    assert re.search(r"held-out loss [+-]\d\.\d\d%$", found[5])
    assert re.match(r"predicted: \d+\.\d GB .*; measured: gradients err by \d\.\d\d%", found[7])
    assert found[9] == "measured: 41 launches a step instead of 3000"


def test_counted_figures_are_the_cost_models(tmp_path):
    found = gains(tmp_path)
    modulation = saved_bytes.weights(technique_table.DEFAULTS)["modulation"]
    assert f"{modulation / 1e9:.1f} GB of weights" in found[8]
    apart, fused = re.search(r"move ([\d.]+) GB .* instead of ([\d.]+)", found[6]).groups()
    assert float(fused) > float(apart) > 50
    assert f"counted: about {57 * NODES} launches" in found[9]


# ---------------------------------------------------------------- pages


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """A folder with the pages and the results, which bench.report takes for its own."""
    found = plan_table.rows()
    monkeypatch.setattr(plan_table, "rows", lambda: found)  # planning takes seconds
    shutil.copytree(report.RESULTS, tmp_path / "results")
    for page in report.pages(report.ROOT):
        copy = tmp_path / page.relative_to(report.ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(page, copy)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_check_sees_every_block_and_writing_mends_it(copied, capsys):
    assert report.main(["--check"]) == 0
    pages, names = report.pages(copied), list(report.blocks(report.RESULTS))
    assert names and sum(text.count(": begin -->") for text in pages.values()) == len(names)
    for name in names:
        ((page, text),) = [(page, text) for page, text in pages.items() if f"{name}: begin" in text]
        inside = text.partition(f"{name}: begin -->")[2].partition(f"<!-- {name}: end")[0]
        page.write_text(text.replace(inside, "\n"), encoding="utf-8")
        assert report.main(["--check"]) == 1
        assert f"{page.relative_to(copied)} differs from the rows" in capsys.readouterr().out
        page.write_text(text, encoding="utf-8")
    page.write_text(text.replace(inside, "\n"), encoding="utf-8")
    assert report.main([]) == 0
    assert report.pages(copied) == pages


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, changed",
    [("step-cpu", ("median_ms", "p10_ms", "p90_ms")), ("quality", ("best_loss",))],
)
def test_a_new_run_is_neither_in_the_tables_nor_on_the_chart(copied, capsys, name, changed):
    path = report.RESULTS / f"{name}.jsonl"
    later = [one | {"date": "later"} for one in rows.last_run(path)]
    later[0] |= {key: 1.5 * later[0][key] for key in changed}
    path.write_text(path.read_text() + "".join(json.dumps(one) + "\n" for one in later))
    assert report.main(["--check"]) == 1
    printed = capsys.readouterr().out
    assert ".md differs from" in printed and f"{name}.svg differs from" in printed
    assert report.main([]) == 0 and report.main(["--check"]) == 0


@pytest.mark.slow
def test_a_gpus_rows_need_its_chart_and_change_the_status(copied, write, capsys):
    assert step_chart.NO_GPU in (copied / "README.md").read_text(encoding="utf-8")
    write("results/step-cuda.jsonl", row("diffusers-nf4"), row())
    assert report.main(["--check"]) == 1
    assert "step-cuda.svg differs" in capsys.readouterr().out
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    text = "\n".join(report.pages(copied).values())
    assert "results/step-cuda.svg" in text and step_chart.NO_GPU not in text
    assert "one step of FLUX.1-dev at 512 px takes 0.50 (fluxfast) of the time of" in text
    assert "; NVIDIA H100 80GB HBM3." in text
    assert "(NVIDIA H100 80GB HBM3)" not in text  # no candidate of a technique is among the rows


@pytest.mark.slow
def test_the_readme_has_four_cards_and_six_techniques(tmp_path):
    found = plan_table.rows()
    cards, every = lines(plan_table.short(found)), lines(plan_table.block(found))
    names = ["RTX 3060 12 GB", "RTX 4060 Ti 16 GB", "RTX 4090", "H100 SXM 80 GB"]
    assert [cells[0] for cells in cards] == names
    for card, *times, how in cards:
        of_card = [cells for cells in every if cells[:2] == [card, plan_table.DEFAULTS]]
        assert times == [cells[4] for cells in of_card]
        assert how == f"{of_card[-1][3]} GiB: {of_card[-1][5]}"
    techniques, every = (
        lines(text(tmp_path)) for text in (technique_table.short, technique_table.block)
    )
    assert len(techniques) == 6 and all(cells in every for cells in techniques)


BEGIN, END = "<!-- b: begin -->", "<!-- b: end -->"


@pytest.mark.parametrize(
    "text",
    ["", BEGIN, END + BEGIN, BEGIN + END + BEGIN + END, BEGIN + END + END],
    ids=["none", "no end", "reversed", "two", "two ends"],
)
def test_a_block_has_one_place(text):
    with pytest.raises(ValueError, match=f"one {BEGIN} and then one {END}"):
        report.put({Path("README.md"): text, Path("docs/a.md"): ""}, "b", "1")


@pytest.mark.parametrize("page, link", [("README.md", "bench"), ("docs/a.md", "../bench")])
def test_links_of_a_block_fit_its_page(page, link):
    texts = {Path("b.md"): "other", Path(page): f"a{BEGIN}old{END}z"}
    report.put(texts, "b", "![1](bench/results/x.svg)")
    assert texts[Path(page)] == f"a{BEGIN}\n![1]({link}/results/x.svg)\n{END}z"


# ---------------------------------------------------------------- the log


def test_every_entry_of_the_log_ends_its_title_in_a_verdict():
    """Kept, dropped or open; for what, or under which condition, may follow."""
    entries = re.split(r"^## ", LOG, flags=re.M)[1:]
    assert len(entries) >= 7
    for title, _, text in (entry.partition("\n") for entry in entries):
        tried, _, verdict = title.rpartition(". ")
        assert re.fullmatch(r"(Kept|Dropped|Open)( \([^()]+\)| for [^.]+)?", verdict), title
        assert tried, title
        text = text.strip()
        assert len(text) > 40 and re.search(r"\d", text), f"{title}: no figure says why"


def test_rows_that_the_log_names_exist():
    for name in re.findall(r"`(results/[\w.-]+)`", LOG):
        assert (ROOT / "bench" / name).is_file(), name
