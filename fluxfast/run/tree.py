"""Nested values as JSON and a flat set of tensors, and back: how a checkpoint keeps an optimiser's
state of whatever shape, without pickle.

A tensor becomes {"$tensor": its path}. Python's floats go through JSON exactly (the shortest
decimal that reads back the same); what JSON has no word for is tagged likewise: {"$tuple": […]},
{"$float": "inf"}, {"$items": [[key, value], …]} for a mapping whose keys are not all plain strings.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor


def take_apart(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """-> (what JSON holds, path -> tensor). TypeError naming the path of anything that is neither
    a tensor nor None, bool, int, float, str, dict, list or tuple.
    """
    tensors: dict[str, Tensor] = {}
    return _apart(value, "", tensors), tensors


def _apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    below = f"{path}/" if path else ""
    if isinstance(value, Tensor):
        if path in tensors:
            raise TypeError(f"{path}: two keys are spelt alike")
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, dict):
        items = [[key, _apart(item, f"{below}{key}", tensors)] for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(items) if plain else {"$items": items}
    if isinstance(value, list | tuple):
        items = [_apart(item, f"{below}{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} has no place in a checkpoint")


def put_together(value: Any, tensor: Callable[[str], Any]) -> Any:
    """What `take_apart` took apart. tensor: path -> what stands there."""
    if isinstance(value, list):
        return [put_together(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value)) if len(value) == 1 else ""
    if tag == "$tensor":
        return tensor(value[tag])
    if tag == "$float":
        return float(value[tag])
    if tag == "$tuple":
        return tuple(put_together(item, tensor) for item in value[tag])
    items = value["$items"] if tag == "$items" else value.items()
    return {key: put_together(item, tensor) for key, item in items}
