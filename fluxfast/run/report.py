"""report.html: what a run did, on one page without scripts, fonts or files of its own.

Everything is read from the run's folder; what is missing or damaged there becomes a note. The
template `report.html.j2` escapes all text, and its policy forbids scripts and outside addresses.
"""

import base64
import html
import io
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from fluxfast.config.yaml_io import parse_yaml
from fluxfast.run.plots import drawable, loss_figure, validation_figure
from fluxfast.run.validation import best, read_validations
from fluxfast.sampling.picture import read_png
from fluxfast.util.files import read_rows, write_atomic

SHEET_SIDE = 1600  # pixels, the longer side of the contact sheet in the page


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from the folder's content and return its path.

    Raises FluxfastError only where the folder cannot be written.
    """
    from jinja2 import Environment  # comes with torch

    metrics, source, settings = [], None, {}
    with suppress(OSError):
        rows = read_rows(run_dir / "metrics.jsonl")
        metrics = [row for row in rows if drawable(row["step"])]
    with suppress(OSError, ValueError):
        source = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
        settings = _mapping(parse_yaml(source))
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    files = [file for file in sorted(run_dir.glob("*.safetensors")) if file.is_file()]
    seconds = [value for value in _values(metrics, "s_per_it") if value > 0]
    environment = Environment(autoescape=True)
    environment.tests["drawable"] = drawable
    page = environment.from_string(template).render(
        name=settings.get("name") or run_dir.resolve().name,
        trigger=_triggers(settings) if settings else None,
        model=_mapping(settings.get("model")).get("path"),
        date=_date(run_dir / "metrics.jsonl") or _date(run_dir / "config.yaml"),
        step=metrics[-1]["step"] if metrics else None,
        total=_mapping(settings.get("train")).get("steps"),
        skipped=sum(_values(metrics, "skipped_steps")),
        s_per_it=median(seconds) if seconds else None,
        peak_gib=max(_values(metrics, "peak_memory_gib"), default=None),
        loss=_loss(metrics),
        files=[(file.name, file.stat().st_size) for file in files],
        validation=_validation(run_dir / "validation.jsonl"),
        sheet=_sheet(run_dir / "samples.png", _mapping(settings.get("sample"))),
        source=source,
        groups=_groups(settings),
    )
    path = run_dir / "report.html"
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def _mapping(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _triggers(settings: dict) -> str:
    data = settings.get("data")
    entries = [settings, *map(_mapping, data if isinstance(data, list) else [data])]
    words = [str(entry["trigger"]) for entry in entries if entry.get("trigger")]
    return ", ".join(dict.fromkeys(words)) or "none"


def _values(metrics: list[dict], key: str) -> list[float]:
    return [row[key] for row in metrics if drawable(row.get(key))]


def _date(file: Path) -> str | None:
    return (
        f"{datetime.fromtimestamp(file.stat().st_mtime):%Y-%m-%d %H:%M}" if file.is_file() else None
    )


def _loss(metrics: list[dict]) -> dict | None:
    if not (losses := _values(metrics, "loss")):
        return None
    last = (_values(metrics, "loss_smooth") or losses)[-1]
    label = f"Training loss over steps, {last:.4f} at the end, smoothed."
    return {"svg": _labeled(loss_figure(metrics), label), "last": last}


def _labeled(svg: str, label: str) -> str:
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def _validation(path: Path) -> dict | str:
    """Returns the section's content, or a note instead of it."""
    try:
        measured = read_validations(path)
        readable = measured or not path.is_file() or path.stat().st_size == 0
    except OSError:
        measured, readable = [], False
    if not readable:
        return "validation.jsonl cannot be read."
    numbers = ("step", "loss", "base_loss", "difference")
    rows = [row for row in measured if all(drawable(getattr(row, key)) for key in numbers)]
    if (best_row := best(rows)) is None:
        return "No validation was recorded. Set validation.share to hold pictures out of training."
    label = f"Validation loss over steps, best at step {best_row.step}."
    svg = _labeled(validation_figure(rows), label)
    return {"best": best_row, "last": rows[-1], "svg": svg}


def _sheet(path: Path, sample: dict) -> dict | str:
    """Returns the section's content, or a note instead of it."""
    if not path.is_file():
        return "No previews: samples.png is not there. See sample.prompts."
    if (picture := read_png(path)) is None:
        return "samples.png is not a picture that can be read."
    picture.thumbnail((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)
    encoded = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        picture.save(buffer := io.BytesIO(), kind, **options)
        encoded[kind] = base64.b64encode(buffer.getvalue()).decode()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    names = (re.fullmatch(r"\d+-step(\d+)", f.stem) for f in path.parent.glob("samples/*.png"))
    plain, own = (sample.get(name) for name in ("prompts", "samples"))
    prompts = plain if isinstance(plain, list) else []
    own = own if isinstance(own, list) else []
    return {
        "uri": f"data:image/{kind};base64,{encoded[kind]}",
        "width": picture.width,
        "steps": sorted({int(match[1]) for match in names if match}),
        "prompts": [*prompts, *(_mapping(each).get("prompt") for each in own)],
    }


def _groups(settings: dict) -> dict[str, dict]:
    """Returns section -> its settings; each entry of a list of mappings is a section of its own."""
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
