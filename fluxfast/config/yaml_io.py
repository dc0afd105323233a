"""Settings before they are validated: YAML in and out, `a.b=c` overrides, the file that
`model.layers` may name, and what no setting may hold. Knows neither torch nor the configuration.

A file may come from a stranger: nothing in it makes an object, and one that would grow beyond its
own size is refused before it is built.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fluxfast.errors import ConfigError
from fluxfast.util.redact import holds_token

LARGEST = 1_000_000  # bytes of a file, and characters of it with its aliases written out
DEEPEST = 50  # mappings and lists inside one another
_DEEP = f"it is more than {DEEPEST} levels deep"
LONGEST_NUMBER = 400  # digits; Python refuses to print one of more than 4300
_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map", "merge")
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 1e-4 is a number and not a word."""

    def measure(
        self, node: yaml.Node, known: dict[yaml.Node, tuple[int, int] | None]
    ) -> tuple[int, int]:
        """Returns (characters, levels) with every alias written out. `known` holds those of other
        nodes, None for one that is being measured: an alias to it would have no end.

        Raises ValueError for what is beyond the limits, or of a kind that is not read.
        """
        if node in known:
            if (measured := known[node]) is None:
                raise ValueError("it has an alias inside what the alias stands for")
            return measured
        known[node] = None
        if node.tag not in _TAGS:
            raise ValueError(f"it has a value of the kind {node.tag}: only plain ones are read")
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node)
            size, levels = 1 + len(node.value), 0
        else:
            mapping = isinstance(node, yaml.MappingNode)
            inner = [part for pair in node.value for part in pair] if mapping else node.value
            sizes = [self.measure(part, known) for part in inner]
            size = 1 + sum(size for size, _ in sizes)
            levels = 1 + max((below for _, below in sizes), default=0)
        if size > LARGEST:
            raise ValueError(f"its aliases make more than {LARGEST} characters of it")
        if levels > DEEPEST:
            raise ValueError(_DEEP)
        known[node] = size, levels
        return size, levels

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        """Refuses a tag that the value does not fit, where PyYAML would raise IndexErrors."""
        kind = node.tag.rpartition(":")[2]
        looks = self.resolve(yaml.ScalarNode, node.value, (True, False)).rpartition(":")[2]
        if kind not in ("str", looks) and (kind, looks) != ("float", "int"):
            raise ValueError(f"{node.value[:60]!r} is not of the kind {kind}")
        if kind in ("int", "float") and len(node.value) > LONGEST_NUMBER:
            raise ValueError(f"it has a number of more than {LONGEST_NUMBER} digits")


class _Dumper(yaml.SafeDumper):
    """Quotes a word that `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def parse_yaml(text: str) -> Any:
    """Returns plain values, lists and mappings. Raises ValueError, in one line, for what is no YAML
    and for what is beyond the limits above.
    """
    if len(text) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST} bytes")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        loader.measure(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(_DEEP) from None
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2024-13-45 is a ValueError
        raise ValueError(" ".join(str(error).split())) from None


def dump_yaml(data: Any) -> str:
    """Returns YAML that `read_mapping` reads back to the same, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


def read_mapping(path: Path, title: str) -> dict:
    """Returns the mapping that a YAML file holds. Raises ConfigError, calling the file `title`."""
    content = read_limited(path, title)
    try:
        raw = parse_yaml(content.decode("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        got = "nothing" if raw is None else type(raw).__name__
        raise ConfigError(f"{path} must hold a mapping of settings, got {got}")
    return raw


def read_limited(path: Path, title: str) -> bytes:
    """Returns a file's bytes. Raises ConfigError where it cannot be read or is above LARGEST."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {title} {path}: {error.strerror or error}") from None
    if len(content) > LARGEST:
        raise ConfigError(f"{path} is larger than {LARGEST} bytes")
    return content


def check_texts(raw: Any) -> None:
    """Raises ConfigError, naming the setting, for text that must not be kept or cannot be: an
    access token, which would be in config.yaml and in every LoRA file; NUL, half a character.
    """
    for location, text in _texts(raw, ""):
        if holds_token(text):
            raise ConfigError(
                f"{location} holds an access token, which would be saved with the run and its LoRA",
                hint="leave it out, and run `hf auth login` or set the variable HF_TOKEN",
            )
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ConfigError(f"{location} holds a character that no text file can: {text[:60]!r}")


def _texts(value: Any, location: str) -> Iterator[tuple[str, str]]:
    """Yields (where it stands, text) of every key and value."""
    if isinstance(value, str):
        yield location or "the value", value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(key, str):
                yield f"a key in {location or 'the settings'}", key
            yield from _texts(inner, f"{location}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{location}.{index}".lstrip("."))


def insert_layers(raw: dict) -> None:
    """Replaces a path in `model.layers` by the mapping under that file's key `layers`, in place.

    Raises ConfigError for a file that cannot be read or has no such mapping.
    """
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("layers"), str):
        model["layers"] = read_layers(Path(model["layers"]))
    elif isinstance(model, dict) and model.get("layers", ...) is None:
        model["layers"] = {}


def read_layers(path: Path) -> dict:
    """Returns the mapping `layers` of a file that `fluxfast check` wrote, or raises ConfigError."""
    layers = read_mapping(path, "model.layers").get("layers")
    if not isinstance(layers, dict):
        raise ConfigError(
            f"model.layers: {path} holds no mapping `layers`",
            hint="`fluxfast check CONFIG` writes such a file",
        )
    return layers


def apply_override(raw: dict, override: str) -> None:
    """Sets one `a.b=c` (c is YAML) in place. Raises ConfigError for what is no such thing."""
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"--set takes KEY=VALUE, with a name on either side of a dot, got {override!r}",
            hint="--set train.steps=500",
        )
    try:
        parsed = parse_yaml(value)
    except ValueError:
        raise ConfigError(f"--set {key}: {value!r} is not a YAML value") from None
    if isinstance(raw.get("data"), dict) and re.match(r"data\.\d", key):
        raw["data"] = [raw["data"]]  # one folder may be written without the list
    if parts[:2] == ["model", "layers"] and parts[2:]:  # layer names have dots of their own
        parts[2:] = [".".join(parts[2:])]
    node: Any = raw
    for depth, part in enumerate(parts, 1):
        index: Any = part
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(f"--set {key}: {part!r} is not an index of a list of {len(node)}")
            index = int(part)
        elif not isinstance(node, dict):
            raise ConfigError(f"--set {key}: {part!r} lies below a plain value")
        elif depth == len(parts):
            node.pop(part, None)  # to the end: of model.layers the last match wins
        elif not isinstance(node.get(part), dict | list):
            node[part] = {}
        if depth == len(parts):
            node[index] = parsed
        else:
            node = node[index]
