"""docs/config.md: every setting as Markdown, from its pydantic field. `make docs` writes it."""

import json
import sys
from typing import Any

from fluxfast.config.schema import Config

HEAD = """# Settings

Generated from the code by `make docs`.

A configuration is a YAML file with the sections below; `--set train.steps=500` overrides a key.
Only `model.path` and `data.folder` are required. An unknown key is an error that names the nearest
known one; a key given twice is an error. Paths are relative to the folder the command runs in, `~`
is the home folder. A run saves its resolved configuration as `config.yaml`.
"""
_UNBOUNDED = 10_000  # upper bounds from here on only keep nonsense out
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}


def markdown() -> str:
    schema = Config.model_json_schema()
    return "\n".join([HEAD, *_section(schema, "", schema["$defs"])])


def _section(
    schema: dict[str, Any], name: str, models: dict[str, Any], known: dict[str, Any] | None = None
) -> list[str]:
    """A heading and a table of the plain keys, then the sections below. known: what the section
    around it has, which is not repeated.
    """
    nested, rows, as_above, known = [], [], [], known or {}
    for key, field in schema["properties"].items():
        path = f"{name}.{key}" if name else key
        each = field.get("items", field)
        model = next((e["$ref"] for e in (each, *each.get("anyOf", ())) if "$ref" in e), None)
        if field == known.get(key):
            as_above.append(f"`{key}`")
            continue
        if model:
            section = models[model.rpartition("/")[2]] | field
            nested += _section(section, path, models, schema["properties"])
            continue
        value = field.get("default")
        text = value if isinstance(value, str) else json.dumps(value)
        default = "required" if key in schema.get("required", ()) else f"`{text}`"
        description = " ".join(field.get("description", "").split()).replace("|", "\\|")
        rows.append(f"| `{key}` | {_values(field)} | {default} | {description} |")
    note = [f"{schema['description']}\n"] if "description" in schema else []
    head = [f"## {name or 'Top level'}\n", *note, "| key | values | default | meaning |"]
    rest = [f"\nAnd {', '.join(as_above)}, as above."] if as_above else []
    return [*head, "|---|---|---|---|", *rows, *rest, "", *nested]


def _values(field: dict[str, Any]) -> str:
    """What a key takes, in words."""
    if "anyOf" in field:
        return " or ".join(_values(each) for each in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "items" in field:
        return f"list of {_values(field['items'])}"
    extra = field.get("additionalProperties")
    if extra:
        return "mapping" if extra is True else f"mapping to {_values(extra)}"
    bounds = [f"{sign} {field[key]:g}" for key, sign in _BOUNDS.items() if key in field]
    if field.get("maximum", _UNBOUNDED) < _UNBOUNDED:
        bounds.append(f"≤ {field['maximum']:g}")
    kind = "path" if field.get("format") == "path" else field["type"]
    return ", ".join([kind, *bounds])


if __name__ == "__main__":
    sys.stdout.write(markdown())
