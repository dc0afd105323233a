"""report.html: what a run did, on one page without scripts, fonts or files of its own.

Everything is read from the run's folder; what is missing there is left out with a note. All text
goes through `_text`, which escapes it, and the page's policy forbids scripts and outside addresses.
"""

import base64
import html
import io
import re
import statistics
from datetime import datetime
from pathlib import Path

from PIL import Image

from fluxfast.config.yaml_io import parse_yaml
from fluxfast.run.plots import drawable, loss_figure, validation_figure
from fluxfast.run.validation import Validation, best, read_validations
from fluxfast.util.files import read_rows, write_atomic

SHEET_SIDE = 1600  # pixels, the longer side of the contact sheet in the page

_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1d1d1b; --soft: #5c5c58;
  --line: #dcdcd8; --lora: #0072b2; --base: #d55e00; --good: #00694c; --bad: #a63d00; }
@media (prefers-color-scheme: dark) { :root { --page: #161614; --card: #21211f; --ink: #ecece8;
  --soft: #a9a9a3; --line: #3b3b37; --lora: #56b4e9; --base: #e69f00; --good: #4fd0a5;
  --bad: #ff9d5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem; max-width: 66rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 0 0 .75rem; font-size: 1.15rem; }
h3 { margin: 0 0 .25rem; font-size: .9rem; }
p { margin: 0 0 .75rem; }
section { margin-top: 1rem; padding: 1.1rem; background: var(--card); border-radius: .6rem;
  border: 1px solid var(--line); min-width: 0; }
dl.facts { display: grid; gap: .75rem 1.5rem; margin: 1rem 0 0;
  grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
dt, .note, figcaption { color: var(--soft); font-size: .875rem; }
dd { margin: 0; font-weight: 600; }
.pair { display: grid; gap: 0 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.verdict { font-weight: 600; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.size { width: 1%; white-space: nowrap; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 36rem; margin: 0 auto; }
figcaption { margin-top: .5rem; }
figcaption ol { margin: .25rem 0 0; padding-left: 1.5rem; }
.scroll { overflow-x: auto; }
.scroll img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { padding: .2rem .75rem .2rem 0; text-align: left; vertical-align: baseline;
  border-top: 1px solid var(--line); font-weight: 400; }
th { color: var(--soft); width: 52%; }
code, pre, .settings td { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .85em; }
pre { margin: 0; overflow-x: auto; overflow-wrap: normal; }
.settings { columns: 20rem; column-gap: 2rem; }
.settings div { break-inside: avoid; margin-bottom: 1rem; }
"""


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from what the folder holds. -> its path.

    Raises FluxfastError where the folder cannot be written; nothing missing or broken in it is an
    error.
    """
    run_dir = Path(run_dir)
    metrics = _read_metrics(run_dir / "metrics.jsonl")
    settings, source = _read_settings(run_dir / "config.yaml")
    name = settings.get("name") or run_dir.resolve().name
    body = [
        _head(run_dir, name, settings, metrics),
        '<div class="pair">',
        "<div>",
        _loss(metrics),
        _files(run_dir),
        "</div>",
        _validation(run_dir / "validation.jsonl"),
        "</div>",
        _sheet(run_dir / "samples.png", settings),
        _settings(settings, source),
    ]
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{_text(name)} · fluxfast</title>
<style>{_STYLE}</style>
</head>
<body>
{"".join(part + chr(10) for part in body)}</body>
</html>
"""
    path = run_dir / "report.html"
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def _text(value) -> str:
    return html.escape(str(value))


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _read_metrics(path: Path) -> list[dict]:
    try:
        return [row for row in read_rows(path) if drawable(row["step"])]
    except OSError:
        return []


def _read_settings(path: Path) -> tuple[dict, str | None]:
    """-> (the settings, empty where they cannot be parsed; the text, None without a file)."""
    try:
        source = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}, None
    try:
        settings = parse_yaml(source)
    except ValueError:
        settings = None
    return (settings if isinstance(settings, dict) else {}), source


def _values(metrics: list[dict], key: str) -> list[float]:
    return [row[key] for row in metrics if drawable(row.get(key))]


def _head(run_dir: Path, name, settings: dict, metrics: list[dict]) -> str:
    model, train = (_below(settings, key) for key in ("model", "train"))
    facts = {"Trigger": settings.get("trigger") or "none" if settings else None}
    facts["Base model"] = model.get("path")
    dated = [run_dir / file for file in ("metrics.jsonl", "config.yaml")]
    dated = [file for file in dated if file.is_file()]
    if dated:
        facts["Date"] = f"{datetime.fromtimestamp(dated[0].stat().st_mtime):%Y-%m-%d %H:%M}"
    if metrics:
        of = f" of {train['steps']}" if "steps" in train else ""
        skipped = sum(_values(metrics, "skipped_steps"))
        facts["Steps"] = f"{metrics[-1]['step']}{of} · {skipped or 'none'} skipped"
    if seconds := [value for value in _values(metrics, "s_per_it") if value > 0]:
        middle = statistics.median(seconds)
        facts["Speed, median"] = f"{middle:.3g} s/it · {1 / middle:.3g} it/s"
    if peaks := _values(metrics, "peak_memory_gib"):
        facts["Peak memory"] = f"{max(peaks):.2f} GiB"
    items = [
        f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>"
        for key, value in facts.items()
        if value is not None
    ]
    return f'<header>\n<h1>{_text(name)}</h1>\n<dl class="facts">{"".join(items)}</dl>\n</header>'


def _below(settings: dict, key: str) -> dict:
    value = settings.get(key)
    return value if isinstance(value, dict) else {}


def _loss(metrics: list[dict]) -> str:
    losses = _values(metrics, "loss")
    if not losses:
        return _section("Loss", _note("No loss was recorded: metrics.jsonl is missing or empty."))
    last = (_values(metrics, "loss_smooth") or losses)[-1]
    svg = _chart(
        loss_figure(metrics), f"Training loss over steps, {last:.4f} at the end, smoothed."
    )
    text = f"Smoothed loss at the end: {last:.4f}. "
    text += "Its noise is large: pictures or a validation tell more than its slope."
    return _section("Loss", f"<figure>{svg}<figcaption>{_text(text)}</figcaption></figure>")


def _chart(svg: str, words: str) -> str:
    return svg.replace("<svg ", f'<svg role="img" aria-label="{_text(words)}" ', 1)


def _validation(path: Path) -> str:
    title = "Validation against the base model"
    try:
        measured = read_validations(path)
        unread = not measured and path.is_file() and path.stat().st_size > 0
    except OSError:
        measured, unread = [], True
    rows = [row for row in measured if _whole(row)]
    if unread:
        return _section(title, _note("validation.jsonl cannot be read."))
    if not rows:
        hint = "No validation was recorded. Set validation.share to hold pictures out of training."
        return _section(title, _note(hint))
    top, last = best(rows), rows[-1]
    kind, verdict = _verdict(top)
    parts = [
        f'<p class="verdict {kind}">The LoRA {_text(verdict)}</p>',
        f"<p>{_text(f'Best step: {top.step}. {_difference(top)}')}</p>",
    ]
    if last.step != top.step:
        parts.append(f"<p>{_text(f'Last step: {last.step}. {_difference(last)}')}</p>")
    svg = _chart(
        validation_figure(rows), f"Validation loss over steps, best at step {top.step}: {verdict}"
    )
    count = f"{top.pictures} held-out picture" + ("s" if top.pictures != 1 else "")
    text = f"The same noise each time, {count}. The best step was chosen by these very pictures, "
    text += "which flatters it a little."
    parts.append(f"<figure>{svg}<figcaption>{_text(text)}</figcaption></figure>")
    return _section(title, *parts)


def _whole(row: Validation) -> bool:
    return all(drawable(value) for value in (row.step, row.loss, row.base_loss, row.difference))


def _verdict(row: Validation) -> tuple[str, str]:
    """-> (CSS class, what follows "The LoRA")."""
    if not (drawable(row.low) and drawable(row.high)):
        return "", "may or may not help: one picture gives no interval."
    if row.high < 0:
        return "good", "helps: the whole interval lies below zero."
    if row.low > 0:
        return "bad", "makes it worse: the whole interval lies above zero."
    return "", "does not help yet: the interval includes zero."


def _difference(row: Validation) -> str:
    """The measurement in words. The sign is the words', the interval's ends keep theirs."""
    text = f"Loss {row.loss:.4f} against the base model's {row.base_loss:.4f}: "
    if row.difference == 0:
        text += "no difference"
    else:
        text += f"{abs(row.difference):.4f} {'lower' if row.difference < 0 else 'higher'}"
        if row.base_loss:
            text += f" ({100 * abs(row.difference / row.base_loss):.1f} %)"
    if drawable(row.low) and drawable(row.high):
        ends = f"{row.low:+.4f} to {row.high:+.4f}".replace("-", "−")
        text += f"; 95 % interval of the difference {ends}"
    return text + "."


def _sheet(path: Path, settings: dict) -> str:
    title = "Previews"
    if not path.is_file():
        return _section(title, _note("No previews: samples.png is not there. See sample.prompts."))
    try:
        uri, width = _shrink(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return _section(title, _note("samples.png is not a picture that can be read."))
    prompts = _below(settings, "sample").get("prompts")
    items = "".join(f"<li>{_text(p)}</li>" for p in prompts) if isinstance(prompts, list) else ""
    found = (
        re.fullmatch(r"\d+-step(\d+)", file.stem) for file in path.parent.glob("samples/*.png")
    )
    steps = ", ".join(str(step) for step in sorted({int(match[1]) for match in found if match}))
    caption = f"A column per step{': ' if steps else ''}{steps}; a row per prompt"
    caption += f":<ol>{items}</ol>" if items else "."
    # on a phone the sheet keeps a legible width and scrolls inside its box
    image = (
        f'<img src="{uri}" style="min-width: {min(width, 800)}px" '
        'alt="Contact sheet of the previews: a row per prompt, a column per step">'
    )
    figure = f'<figure><div class="scroll" tabindex="0">{image}</div>'
    return _section(title, f"{figure}<figcaption>{caption}</figcaption></figure>")


def _shrink(path: Path) -> tuple[str, int]:
    """-> (data URI of the picture at most SHEET_SIDE wide and high, PNG or JPEG, whichever is
    smaller; its width in pixels).
    """
    with Image.open(path, formats=("PNG",)) as image:
        picture = image.convert("RGB")
    picture.thumbnail((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)
    encoded = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    data = base64.b64encode(encoded[kind]).decode()
    return f"data:image/{kind};base64,{data}", picture.width


def _files(run_dir: Path) -> str:
    rows = []
    for file in sorted(run_dir.glob("*.safetensors")):
        if file.is_file():
            size = _size(file.stat().st_size)
            name = f"<td><code>{_text(file.name)}</code></td>"
            rows.append(f'<tr>{name}<td class="size">{size}</td></tr>')
    if not rows:
        return _section("LoRA files", _note("No LoRA file was written yet."))
    return _section("LoRA files", f'<div class="scroll"><table>{"".join(rows)}</table></div>')


def _size(count: int) -> str:
    if count < 1000 * 1024:
        return f"{count / 1024:.1f} KiB"
    return f"{count / 2**20:.1f} MiB" if count < 1000 * 2**20 else f"{count / 2**30:.2f} GiB"


def _settings(settings: dict, source: str | None) -> str:
    if source is None:
        return _section("Settings", _note("config.yaml is not there."))
    if not settings:
        note = _note("config.yaml cannot be parsed; this is its text.")
        return _section("Settings", note, f'<pre tabindex="0">{_text(source)}</pre>')
    groups: dict[str, dict] = {"run": {}}
    for key, value in settings.items():
        if isinstance(value, dict):
            groups[str(key)] = value
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                groups[f"{key} {index + 1}" if len(value) > 1 else str(key)] = item
        else:
            groups["run"][key] = value
    tables = [
        f"<div><h3>{_text(title)}</h3><table>"
        + "".join(
            f'<tr><th scope="row">{_text(key)}</th><td>{_setting(value)}</td></tr>'
            for key, value in group.items()
        )
        + "</table></div>"
        for title, group in groups.items()
        if group
    ]
    return _section("Settings", f'<div class="settings">{"".join(tables)}</div>')


def _setting(value) -> str:
    """A value as YAML would have it on a line; a list an item a line."""
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        return "<br>".join(_text(item) for item in value)
    if value is None or isinstance(value, bool):
        return {None: "–", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "<br>".join(f"{_text(k)}: {_setting(v)}" for k, v in value.items()) or "–"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value) or "–"
    return _text(value)
