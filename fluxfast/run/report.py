"""report.html: what a run did, on one page without scripts, fonts or files of its own.

Everything is read from the run's folder; what is missing there is left out with a note. The page
is `report.html.j2`, which escapes all text, and whose policy forbids scripts and outside addresses.
"""

import base64
import html
import io
import re
import statistics
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from PIL import Image

from fluxfast.config.yaml_io import parse_yaml
from fluxfast.run.plots import drawable, loss_figure, validation_figure
from fluxfast.run.validation import Validation, best, read_validations
from fluxfast.util.files import read_rows, write_atomic

SHEET_SIDE = 1600  # pixels, the longer side of the contact sheet in the page


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from the folder's content. Returns its path.

    Raises FluxfastError where the folder cannot be written; nothing missing or broken in it is an
    error.
    """
    from jinja2 import Environment  # comes with torch

    run_dir = Path(run_dir)
    metrics = _read_metrics(run_dir / "metrics.jsonl")
    settings, source = _read_settings(run_dir / "config.yaml")
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            name=settings.get("name") or run_dir.resolve().name,
            facts=_facts(run_dir, settings, metrics),
            loss=_loss(metrics),
            files=_files(run_dir),
            validation=_validation(run_dir / "validation.jsonl"),
            sheet=_sheet(run_dir / "samples.png", settings),
            source=source,
            groups=_groups(settings),
        )
    )
    path = run_dir / "report.html"
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def _read_metrics(path: Path) -> list[dict]:
    try:
        return [row for row in read_rows(path) if drawable(row["step"])]
    except OSError:
        return []


def _read_settings(path: Path) -> tuple[dict, str | None]:
    """Returns (settings, {} where they cannot be parsed; text, None without a file)."""
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


def _facts(run_dir: Path, settings: dict, metrics: list[dict]) -> dict[str, Any]:
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
    return {key: value for key, value in facts.items() if value is not None}


def _below(settings: dict, key: str) -> dict:
    value = settings.get(key)
    return value if isinstance(value, dict) else {}


def _loss(metrics: list[dict]) -> dict | None:
    losses = _values(metrics, "loss")
    if not losses:
        return None
    last = (_values(metrics, "loss_smooth") or losses)[-1]
    label = f"Training loss over steps, {last:.4f} at the end, smoothed."
    return {"svg": _labeled(loss_figure(metrics), label), "last": last}


def _labeled(svg: str, label: str) -> str:
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def _validation(path: Path) -> dict | str:
    """Returns the section's parts, or a note."""
    try:
        measured = read_validations(path)
        unread = not measured and path.is_file() and path.stat().st_size > 0
    except OSError:
        measured, unread = [], True
    if unread:
        return "validation.jsonl cannot be read."
    rows = [row for row in measured if _whole(row)]
    if not rows:
        return "No validation was recorded. Set validation.share to hold pictures out of training."
    top, last = cast(Validation, best(rows)), rows[-1]
    kind, verdict = _verdict(top)
    lines = [f"Best step: {top.step}. {_difference(top)}"]
    if last.step != top.step:
        lines.append(f"Last step: {last.step}. {_difference(last)}")
    label = f"Validation loss over steps, best at step {top.step}: {verdict}"
    count = f"{top.pictures} held-out picture" + ("s" if top.pictures != 1 else "")
    caption = f"The same noise each time, {count}. The best step was chosen by these very pictures,"
    return {
        "kind": kind,
        "verdict": verdict,
        "lines": lines,
        "svg": _labeled(validation_figure(rows), label),
        "caption": f"{caption} which flatters it a little.",
    }


def _whole(row: Validation) -> bool:
    return all(drawable(value) for value in (row.step, row.loss, row.base_loss, row.difference))


def _verdict(row: Validation) -> tuple[str, str]:
    """Returns (CSS class, the words after "The LoRA")."""
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


def _sheet(path: Path, settings: dict) -> dict | str:
    """Returns the section's parts, or a note."""
    if not path.is_file():
        return "No previews: samples.png is not there. See sample.prompts."
    try:
        uri, width = _shrink(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return "samples.png is not a picture that can be read."
    prompts = _below(settings, "sample").get("prompts")
    names = (re.fullmatch(r"\d+-step(\d+)", f.stem) for f in path.parent.glob("samples/*.png"))
    return {
        "uri": uri,
        "width": width,
        "steps": sorted({int(match[1]) for match in names if match}),
        "prompts": prompts if isinstance(prompts, list) else [],
    }


def _shrink(path: Path) -> tuple[str, int]:
    """Returns (data URI of the picture at most SHEET_SIDE wide and high, PNG or JPEG, whichever is
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


def _files(run_dir: Path) -> list[tuple[str, str]]:
    files = [file for file in sorted(run_dir.glob("*.safetensors")) if file.is_file()]
    return [(file.name, _size(file.stat().st_size)) for file in files]


def _size(count: int) -> str:
    if count < 1000 * 1024:
        return f"{count / 1024:.1f} KiB"
    return f"{count / 2**20:.1f} MiB" if count < 1000 * 2**20 else f"{count / 2**30:.2f} GiB"


def _groups(settings: dict) -> dict[str, dict]:
    """Section -> its settings; each entry of a list of mappings is a section of its own."""
    groups: dict[str, dict] = {"run": {}} if settings else {}
    for key, value in settings.items():
        if isinstance(value, dict):
            groups[str(key)] = value
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                groups[f"{key} {index + 1}" if len(value) > 1 else str(key)] = item
        else:
            groups["run"][key] = value
    return groups
