"""Settings before they are validated: YAML in and out, `a.b=c` overrides, the file that
`model.layers` may name. Knows neither torch nor the configuration.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from fluxfast.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 1e-4 is a number and not a word."""


class _Dumper(yaml.SafeDumper):
    """Quotes a word that `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
# a date such as 2024-13-45 raises a bare ValueError, as text that is not UTF-8 does
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


LARGEST = 1_000_000  # bytes of a file of layers: a name and a choice of each take 60


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)


def dump_yaml(data: Any) -> str:
    """YAML that `read_mapping` reads back to the same, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


def read_mapping(path: Path, what: str) -> dict:
    """The mapping that a YAML file holds. Raises ConfigError, naming `what` it should be."""
    try:
        raw = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror or error}") from None
    except _YAML_ERRORS as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        got = "nothing" if raw is None else type(raw).__name__
        raise ConfigError(f"{path} must hold a mapping of settings, got {got}")
    return raw


def insert_layers(raw: dict) -> None:
    """Replace a path in `model.layers` by the mapping under that file's key `layers`, in place.

    Raises ConfigError for a file that cannot be read or has no such mapping.
    """
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("layers"), str):
        model["layers"] = read_layers(Path(model["layers"]))
    elif isinstance(model, dict) and model.get("layers", ...) is None:
        model["layers"] = {}


def read_layers(path: Path) -> dict:
    """The mapping `layers` of a file that `fluxfast check` wrote. Raises ConfigError without."""
    if path.is_file() and path.stat().st_size > LARGEST:
        raise ConfigError(f"model.layers: {path} is larger than {LARGEST} bytes")
    layers = read_mapping(path, "model.layers").get("layers")
    if not isinstance(layers, dict):
        raise ConfigError(
            f"model.layers: {path} holds no mapping `layers`",
            hint="`fluxfast check CONFIG` writes such a file",
        )
    return layers


def apply_override(raw: dict, override: str) -> None:
    """Set one `a.b=c` (c is YAML) in place. Raises ConfigError for what is no such thing."""
    if isinstance(raw.get("data"), dict) and re.match(r"data\.\d", override):
        raw["data"] = [raw["data"]]  # one folder may be written without the list
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes KEY=VALUE, got {override!r}", hint="--set train.steps=500")
    node: Any = raw
    parts = key.split(".")
    if not all(parts):
        raise ConfigError(
            f"--set {key}: a name is missing beside a dot", hint="--set train.steps=500"
        )
    if parts[:2] == ["model", "layers"]:  # the names below it have dots of their own
        parts[2:] = [".".join(parts[2:])] if parts[2:] else []
    for part, following in zip(parts, parts[1:] + [""], strict=True):
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(f"--set {key}: {part!r} is not an index of a list of {len(node)}")
            part = int(part)
        elif not isinstance(node, dict):
            raise ConfigError(f"--set {key}: {part!r} lies below a plain value")
        if not following:
            _put(node, part, value, key)
        elif isinstance(node, dict):
            if not isinstance(node.get(part), dict | list):
                node[part] = {}
            node = node[part]
        else:
            node = node[part]


def _put(node: dict | list, part: str | int, value: str, key: str) -> None:
    try:
        parsed = _parse(value)
    except _YAML_ERRORS:
        raise ConfigError(f"--set {key}: {value!r} is not a YAML value") from None
    if isinstance(node, dict):
        node.pop(part, None)  # to the end: of model.layers the last match wins
    node[part] = parsed
