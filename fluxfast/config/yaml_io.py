"""Settings before they are validated: YAML in and out, `a.b=c` overrides, the file that
`model.layers` may name, and what no setting may hold. Knows neither torch nor the configuration.

A file may come from a stranger: nothing in it makes an object, and one that would grow beyond its
own size is refused before it is built.
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from fluxfast.errors import ConfigError
from fluxfast.util.files import expanded
from fluxfast.util.redact import holds_token

LARGEST = 1_000_000  # bytes of a file, and characters of it with its aliases written out
DEEPEST = 50  # mappings and lists inside one another
_DEEP = f"it is more than {DEEPEST} levels deep"
LONGEST_NUMBER = 400  # digits; Python refuses to print one of more than 4300
PATH_HINT = "a path with backslashes takes single quotes or none: 'C:\\pictures', or C:/pictures"
_QUOTES = "text with brackets or quotes in it takes quotes around all: '[trigger] at sea'"
_SAVE_HINT = "save it as UTF-8: an editor's `Save as` has it, PowerShell has -Encoding utf8"
_TAG = "tag:yaml.org,2002:"
_TAGS = {_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
# a part of PyYAML's words | what is found | what to do
_ADVICE = rf"""
escape | a backslash between double quotes that is no escape | {PATH_HINT}
character '\t' | a tab | indent with spaces, not with tabs
mapping values are | a colon too many, or one missing above | text with a colon takes quotes
alphabetic or numeric | a * or & without a name | text that begins with * or & takes quotes
alias | a name behind * that nothing has | text that begins with * or & takes quotes
cannot start any | a letter that text cannot begin with | put the text in quotes
expected <block end> | words or keys out of line | keys of one mapping are in one column; {_QUOTES}
another document | a second document, behind --- | one file holds one configuration
but got | a bracket or brace that is not closed, or a comma that is missing | {_QUOTES}
end of stream | a quote that is not closed | text ends with the quote that it begins with
could not find expected ':' | a line that is no `key: value` | a colon and a space follow a key
"""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except for what people mean otherwise: 1e-4 and 1.5e4 are
    numbers, 010 is ten, 16:9 and 2024-05-01 are words, None is null. A key stands once.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.twice: dict[str, tuple[int, int]] = {}  # key -> the two lines it stands in

    def scan_to_next_token(self) -> None:
        super().scan_to_next_token()
        # tabs may stand between words, as JSON has them, though not indent a line of YAML
        while self.peek() == "\t" and (self.flow_level or not self.allow_simple_key):
            self.forward()
            super().scan_to_next_token()

    def measure(
        self, node: yaml.Node, known: dict[yaml.Node, tuple[int, int] | None]
    ) -> tuple[int, int]:
        """Returns (characters, levels) with every alias written out. `known` holds those of other
        nodes, None for one that is being measured: an alias to it would have no end.

        Raises ValueError for what is beyond the limits, or of a kind that is not read.
        """
        if node in known:
            if (measured := known[node]) is None:
                raise ValueError("an alias in it refers to itself")
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
            if mapping:
                self._find_twice([key for key, _ in node.value])
            sizes = [self.measure(part, known) for part in inner]
            size = 1 + sum(size for size, _ in sizes)
            levels = 1 + max((below for _, below in sizes), default=0)
        if size > LARGEST:
            raise ValueError(f"its aliases make more than {LARGEST} characters of it")
        if levels > DEEPEST:
            raise ValueError(_DEEP)
        known[node] = size, levels
        return size, levels

    def _find_twice(self, keys: list[yaml.Node]) -> None:
        seen: dict[tuple[str, str], int] = {}
        for key in keys:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in seen:
                self.twice[name[1]] = seen[name], line
            seen[name] = line

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        """Refuses a tag that the value does not fit, where PyYAML would raise IndexErrors."""
        kind = node.tag.rpartition(":")[2]
        looks = self.resolve(yaml.ScalarNode, node.value, (True, False)).rpartition(":")[2]
        if kind not in ("str", looks) and (kind, looks) != ("float", "int"):
            raise ValueError(f"{node.value[:60]!r} is not of the kind {kind}")
        if kind in ("int", "float") and len(node.value) > LONGEST_NUMBER:
            raise ValueError(f"it has a number of more than {LONGEST_NUMBER} digits")


class _Dumper(yaml.SafeDumper):
    """Quotes a word that `_Loader` would read as something else."""


_Loader.yaml_implicit_resolvers = {
    letter: [
        row for row in rows if row[0] not in (_TAG + "int", _TAG + "float", _TAG + "timestamp")
    ]
    for letter, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern, _first in (
    ("int", r"[-+]?([0-9][0-9_]*|0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+)$", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", "-+."),
    ("null", r"None$", "N"),
):
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), list(_first))


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = loader.construct_scalar(node).replace("_", "")
    return int(digits, 0 if re.match("[-+]?0[box]", digits) else 10)


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    """Joins what JSON writes as two escapes: \\ud83d\\ude00 is one letter."""
    text = loader.construct_scalar(node).encode("utf-16", "surrogatepass")
    return text.decode("utf-16", "surrogatepass")


_Loader.add_constructor(_TAG + "int", _int)
_Loader.add_constructor(_TAG + "str", _text)


def parse_yaml(text: str) -> Any:
    """Returns plain values, lists and mappings. Raises ConfigError, in one line, for what is no
    YAML and for what is beyond the limits above.
    """
    if len(text) > LARGEST:
        raise ConfigError(f"it is larger than {LARGEST} bytes")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        loader.measure(node, {})
        if loader.twice:
            twice = loader.twice.items()
            listed = (f"the key {key[:60]!r} in lines {a} and {b}" for key, (a, b) in twice)
            raise ConfigError(
                f"written twice: {', '.join(islice(listed, 5))}",
                hint="a key has one value: remove one of the two",
            )
        return loader.construct_document(node)
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(_DEEP) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        reason = f"line {line} holds the character U+{ord(text[error.position]):04X}"
        raise ConfigError(reason, hint="remove it, or rewrite the file") from None
    except (yaml.YAMLError, ValueError) as error:
        raise _explained(error) from None


def _explained(error: Exception) -> ConfigError:
    """Returns PyYAML's error in one line, with what to do about the common ones."""
    reason = " ".join(str(error).split())
    if not isinstance(error, yaml.MarkedYAMLError) or not (mark := error.problem_mark):
        return ConfigError(reason)
    rows = (line.split(" | ") for line in _ADVICE.strip().split("\n"))
    known = (row for part, *row in rows if part in str(error.problem))
    found, advice = next(known, (" ".join(str(error.problem).split()), None))
    return ConfigError(f"line {mark.line + 1}, column {mark.column + 1}: {found}", hint=advice)


def dump_yaml(data: Any) -> str:
    """Returns YAML that `read_mapping` reads back to the same, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


def read_mapping(path: Path, title: str) -> dict:
    """Returns the mapping that a YAML file holds. Raises ConfigError, calling the file `title`."""
    content = read_limited(path, title)
    try:
        raw = parse_yaml(decode(content))
    except ConfigError as error:
        kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
        raise ConfigError(f"{path} is not valid {kind}: {error.message}", hint=error.hint) from None
    if not isinstance(raw, dict):
        got = "nothing" if raw is None else type(raw).__name__
        raise ConfigError(f"{path} must hold a mapping of settings, got {got}")
    return raw


def decode(content: bytes) -> str:
    """Returns a file's text, without a byte order mark. Raises ConfigError unless it is UTF-8."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content:
        raise ConfigError("it is UTF-16, as PowerShell's > writes it, or no text", hint=_SAVE_HINT)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"line {line} is not UTF-8", hint=_SAVE_HINT) from None


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


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]|(?<=^[A-Za-z]:)\xa0")


def check_path(path: Any, *, setting: str = "") -> Any:
    """Returns a path. Raises ConfigError, which begins with the setting's name, for an empty one
    and for what a backslash between double quotes makes of D:\\train: a letter that no path has.
    """
    name = setting and f"{setting} "
    if path == "":
        raise ConfigError(f"{name}is empty")
    if found := _CONTROL.search(str(path)):
        letter = {"\t": "a tab", "\n": "a line break"}.get(found[0], f"U+{ord(found[0]):04X}")
        raise ConfigError(
            f"{name}holds {letter}, which a backslash makes between double quotes: write the path "
            "in single quotes, with / or, in YAML, without quotes"
        )
    return path


def insert_layers(raw: dict) -> None:
    """Replaces a path in `model.layers` by the mapping under that file's key `layers`, in place.

    Raises ConfigError for a file that cannot be read or has no such mapping.
    """
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("layers"), str):
        path = check_path(model["layers"], setting="model.layers")
        model["layers"] = read_layers(expanded(path))


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
    except ConfigError as error:
        reason = f"--set {key}: {value[:80]!r} is not a YAML value: {error.message}"
        raise ConfigError(reason, hint=error.hint) from None
    if isinstance(raw.get("data"), dict) and re.match(r"data\.\d", key):
        raw["data"] = [raw["data"]]  # one folder may be written without the list
    if parts[:2] == ["model", "layers"] and parts[2:]:  # layer names have dots of their own
        parts[2:] = [".".join(parts[2:])]
    node: Any = raw
    for depth, part in enumerate(parts, 1):
        index: Any = part
        if isinstance(node, list) and len(node) == 1 and not part.isdecimal():
            node = node[0]  # data.resolution, of the one folder
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(f"--set {key}: {part!r} is not an index of a list of {len(node)}")
            index = int(part)
        elif not isinstance(node, dict):
            raise ConfigError(f"--set {key}: {part!r} lies below a plain value")
        elif depth == len(parts):
            node.pop(part, None)  # to the end: of model.layers the last match wins
        elif isinstance(node.get(part), str):  # a whole file or preset is named there
            raise ConfigError(f"--set {key}: {'.'.join(parts[:depth])} is {node[part]!r}")
        elif not isinstance(node.get(part), dict | list):
            node[part] = {}
        if depth == len(parts):
            node[index] = parsed
        else:
            node = node[index]
