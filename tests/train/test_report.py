"""The run's charts and its page: what they say, what is escaped, what a browser makes of them."""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from fluxfast.config.schema import build_config, dump_config
from fluxfast.run.plots import loss_figure, plot_validation, validation_figure
from fluxfast.run.report import SHEET_SIDE, write_report
from fluxfast.run.validation import Validation

EVIL = "<script>alert(1)</script>"
ROWS = [
    Validation(0, 0.55, 0.55, 0.0, 0.0, 0.0, 8),
    Validation(100, 0.51, 0.55, -0.04, -0.06, -0.02, 8),
    Validation(200, 0.54, 0.55, -0.01, -0.03, 0.01, 8),
]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = {"meta", "br", "img"}


def metric(step: int, **values) -> dict:
    row = {"step": step, "loss": 0.6 + 0.1 * (step % 3), "loss_smooth": 0.65, "skipped_steps": 0}
    row |= {"s_per_it": 1.25, "it_per_s": 0.8, "peak_memory_gib": 21.4}
    return row | values


def write_rows(path: Path, rows: list, end: str = "") -> None:
    """Lines of dicts or measurements, the last one perhaps cut short."""
    lines = [json.dumps(row if isinstance(row, dict) else asdict(row)) for row in rows]
    path.write_text("\n".join([*lines, end]))


@pytest.fixture
def run_dir(tmp_path):
    """A whole run's folder, whose prompts, trigger and paths try to be markup."""
    folder = tmp_path / "dog"
    (folder / "samples").mkdir(parents=True)
    config = build_config(
        {
            "name": "dog",
            "trigger": f"ohwx {EVIL}",
            "model": {"path": '"><img src=x onerror=alert(1)>'},
            "data": [{"folder": "photos/dog"}, {"folder": "/" + "long-folder-name/" * 20}],
            "sample": {"prompts": [f"a {EVIL} & a dog", "x" * 300]},
            "train": {"steps": 200},
        }
    )
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    rows = [metric(step, skipped_steps=int(step == 20)) for step in range(10, 210, 10)]
    write_rows(folder / "metrics.jsonl", rows, '{"step": 210, "lo')
    write_rows(folder / "validation.jsonl", ROWS, '{"step": 300, "lo')
    Image.effect_noise((2400, 700), 90).convert("RGB").save(folder / "samples.png")
    for step in (0, 100):
        (folder / f"samples/00-step{step:08d}.png").touch()
    (folder / "dog.safetensors").write_bytes(bytes(3 * 2**20))
    (folder / f"dog_{EVIL.replace('/', '')}.safetensors").write_bytes(b"x" * 100)
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the text; asserts that what is opened is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.words.append(data)


def page(folder) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    assert not list(folder.glob(".*"))  # no partial file is left
    return Page(path.read_text(encoding="utf-8"))


def test_what_it_says(run_dir):
    text = page(run_dir).text
    for words in (
        "Steps 200 of 200 · 1 skipped",
        "1.25 s/it · 0.8 it/s",
        "Peak memory 21.40 GiB",
        "Smoothed loss at the end: 0.6500.",
        "The LoRA helps: the whole interval lies below zero.",
        "Best step: 100. Loss 0.5100 against the base model's 0.5500: 0.0400 lower (7.3 %); "
        "95 % interval of the difference −0.0600 to −0.0200.",
        "Last step: 200.",
        "8 held-out pictures",
        "dog.safetensors 3.0 MiB",
        "A column per step: 0, 100; a row per prompt",
        "policy auto",
        "resolution 1024",
    ):
        assert words in text, words
    assert re.search(r"Date 20\d\d-\d\d-\d\d \d\d:\d\d", text)


def test_everything_is_escaped_and_nothing_is_fetched(run_dir):
    found = page(run_dir)
    source = (run_dir / "report.html").read_text(encoding="utf-8")
    assert EVIL not in source and "onerror=alert(1)>" in found.text
    assert found.text.count(EVIL) >= 3  # trigger and prompt, as words
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    for _, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), attributes
    assert "url(" not in re.sub(r"url\(#\w+\)", "", source) and "@import" not in source
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))  # two charts on one page


def test_the_sheet_is_scaled_down(run_dir):
    uris = [attributes["src"] for tag, attributes in page(run_dir).tags if tag == "img"]
    (uri,) = uris
    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", uri).groups()
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format == kind.upper() == "JPEG"  # noise: a PNG of it is far larger
        assert image.size == (SHEET_SIDE, round(700 * SHEET_SIDE / 2400))


def test_nothing_there_is_a_page_of_notes(tmp_path):
    found = page(tmp_path / "empty")
    assert found.text.startswith("empty · fluxfast") and "No LoRA file" in found.text
    assert "svg" not in {tag for tag, _ in found.tags}


@pytest.mark.grid(1)
@pytest.mark.parametrize(
    "missing, words",
    [
        ("metrics.jsonl", "No loss"),
        ("validation.jsonl", "No validation"),
        ("config.yaml", "config.yaml is not"),
        ("samples.png", "No previews"),
    ],
)
def test_one_part_missing(run_dir, missing, words):
    (run_dir / missing).unlink()
    text = page(run_dir).text
    assert text.startswith("dog · fluxfast") and words in text


def test_broken_parts(run_dir):
    (run_dir / "metrics.jsonl").write_bytes(b'\xff\xfe\n[1]\n{"loss": 1}\n{"step": null}\n{"st')
    (run_dir / "validation.jsonl").write_text('{"stride": 1}\n')
    (run_dir / "config.yaml").write_text(f"a: [1\n{EVIL}\n")
    (run_dir / "samples.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    text = page(run_dir).text
    for words in ("No loss", "validation.jsonl cannot be read", "cannot be parsed", EVIL):
        assert words in text
    assert "samples.png is not a picture" in text


@pytest.mark.grid(3)
@pytest.mark.parametrize("number", [10**400, 1e308, -1e308, 1e31, math.nan, None])
def test_numbers_that_a_chart_cannot_hold_are_passed_over(run_dir, number):
    rows = [metric(10, loss=number), metric(20), {"step": number, "loss": 1.0}, metric(30)]
    rows.append(metric(30, loss_smooth=number, s_per_it=number, peak_memory_gib=number))
    write_rows(run_dir / "metrics.jsonl", rows)
    rows = [asdict(row) | {"step": index} for index, row in enumerate(ROWS)]
    wild = [rows[0] | {key: number} for key in ("step", "loss", "base_loss", "difference", "low")]
    write_rows(run_dir / "validation.jsonl", rows + wild)
    text = page(run_dir).text
    assert "30 of 200" in text and "1.25 s/it" in text and "Best step: 1." in text


@pytest.mark.grid(4)
@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.02, -0.01, "helps: the whole"),
        (-0.02, 0.0, "does not help yet: the interval includes zero."),
        (-0.02, 0.01, "does not help yet: the interval includes zero."),
        (0.01, 0.03, "makes it worse: the whole"),
        (None, None, "may or may not help: one picture gives no interval."),
    ],
)
def test_the_verdict(tmp_path, low, high, words):
    row = Validation(10, 0.5, 0.51, -0.01, low, high, 1 if low is None else 5)
    write_rows(tmp_path / "validation.jsonl", [row])
    assert f"The LoRA {words}" in page(tmp_path).text


def test_the_same_run_makes_the_same_page(run_dir):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


@pytest.mark.grid(2)
@pytest.mark.parametrize(
    "rows",
    [ROWS, ROWS[:1], [Validation(5, 0.5, 0.6, -0.1, None, None, 1)], ROWS[:1] * 2],
    ids=["three", "one", "no interval", "the same step twice"],
)
def test_validation_chart(tmp_path, rows, recwarn):
    plot_validation(rows, tmp_path / "validation.png")
    with Image.open(tmp_path / "validation.png") as image:
        assert image.size == (1260, 1080)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    svg = validation_figure(rows)
    known = rows[0].low is not None
    for words in ("validation loss", "difference", "step", "base model", "with the LoRA"):
        assert words in svg
    assert ("95 % interval" in svg) == known
    assert f"best: step {min(rows, key=lambda row: row.loss).step}" in svg
    assert not [warning for warning in recwarn if "fluxfast" in warning.filename]


def test_loss_chart():
    svg = loss_figure([metric(10), metric(20, loss=None), {"step": 30}])
    assert svg.startswith("<svg ") and svg.endswith("</svg>")
    assert "smoothed" in svg and "training loss" in svg and "currentColor" in svg


def test_charts_leave_matplotlib_as_it_was():
    import matplotlib

    with matplotlib.rc_context({"font.size": 33, "text.usetex": True}):
        loss_figure([metric(10)])
        assert matplotlib.rcParams["font.size"] == 33 and matplotlib.rcParams["text.usetex"]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("missing", [(), ("config.yaml", "samples.png"), ("parsed",)], ids=str)
def test_in_a_browser(run_dir, width, missing):
    """No sideways scrolling at a phone's width, and something to see."""
    if missing == ("parsed",):  # the settings' text as it is: one wide block
        (run_dir / "config.yaml").write_text(f"a: [\n{'wide ' * 200}\n")
    else:
        for name in missing:
            (run_dir / name).unlink()
    source = write_report(run_dir).read_text(encoding="utf-8")
    # in a frame: a window of its own cannot be narrower than 500 pixels
    (run_dir / "frame.html").write_text(
        f'<!doctype html><title></title><iframe width="{width}" height="800" frameborder="0" '
        f'srcdoc="{html.escape(source)}" onload="const view = this.contentWindow, '
        "root = view.document.documentElement; "
        "document.title = root.scrollWidth + ' of ' + view.innerWidth\"></iframe>",
        encoding="utf-8",
    )
    dom = _browse(run_dir, width, "--dump-dom", "frame.html")
    scroll, inner = re.search(r"<title>(\d+) of (\d+)</title>", dom).groups()
    assert int(inner) == width and int(scroll) <= width
    _browse(run_dir, width, f"--screenshot={run_dir / 'shot.png'}", "report.html")
    with Image.open(run_dir / "shot.png") as image:
        assert image.width == width
        colors = image.convert("RGB").getcolors(1 << 24)
    assert len(colors) > 50 and max(count for count, _ in colors) < 0.95 * width * 1500


def _browse(run_dir, width: int, action: str, name: str) -> str:
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    flags += "--disable-background-networking --disable-component-update --disable-sync"
    own = [f"--user-data-dir={run_dir / 'profile'}", f"--window-size={width},1500", action]
    command = [BROWSER, *flags.split(), *own, (run_dir / name).as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    shutil.rmtree(run_dir / "profile", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
