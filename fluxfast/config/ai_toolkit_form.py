"""The outer form of an ai-toolkit file: one job of one process, with its placeholders replaced."""

import os
import re
from typing import Any

from fluxfast.errors import ConfigError
from fluxfast.util.redact import names_secret


def open_form(raw: dict) -> tuple[str, dict, list[tuple[str, str]]]:
    """-> (name, the one process, notes on what stands around it). `[name]` and `${VARIABLE}` are
    replaced everywhere, as ai-toolkit does.
    """
    if raw.get("job", "extension") not in ("extension", "train"):
        raise ConfigError(f"job: {raw['job']!r} is not supported: only `extension` trains a LoRA")
    config = raw.get("config")
    if not isinstance(config, dict):
        raise ConfigError("config is missing: a `job:` file needs `config:` with name and process")
    name, processes = config.get("name"), config.get("process")
    # it is put in wherever [name] stands
    if not isinstance(name, str) or not 0 < len(name) <= 150:
        raise ConfigError(
            f"config.name takes the run's name as text of 1 to 150 characters, got {name!r:.80}"
        )
    if not isinstance(processes, list) or len(processes) != 1:
        count = len(processes) if isinstance(processes, list) else repr(processes)
        raise ConfigError(
            f"config.process takes a list of one process, got {count}",
            hint="one file for each training",
        )
    process = _replace(processes[0], name)
    if not isinstance(process, dict):
        raise ConfigError(f"config.process[0] takes a mapping of settings, got {process!r}")
    kinds = ("sd_trainer", "diffusion_trainer", "ui_trainer")
    if process.get("type") not in kinds:
        raise ConfigError(
            f"config.process[0].type {process.get('type')!r} is not supported, only "
            f"{', '.join(kinds)}"
        )
    outside = [(f"config.{key}", "unknown, ignored") for key in config.keys() - {"name", "process"}]
    outside += [(str(key), "unknown, ignored") for key in raw.keys() - {"job", "config", "meta"}]
    if raw.get("meta"):
        reason = "ignored, the LoRA file's header holds name, trigger and the whole configuration"
        outside.append(("meta", reason))
    return name, process, sorted(outside)


def _replace(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _replace(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, name) for item in value]
    if not isinstance(value, str):
        return value
    for variable in re.findall(r"\$\{([^}]+)\}", value):
        if names_secret(variable):
            raise ConfigError(
                f"${{{variable}}} may hold a secret, and settings are saved with the run's LoRA",
                hint="take it out: an access token is found in the variable HF_TOKEN without it",
            )
        if variable not in os.environ:
            raise ConfigError(f"the environment variable {variable} is not set: {value!r}")
        value = value.replace(f"${{{variable}}}", os.environ[variable])
    return value.replace("[name]", name)
