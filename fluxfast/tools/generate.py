"""`fluxfast sample`: prompts to pictures, with LoRAs or without."""

import csv
import hashlib
import re
from collections.abc import Sequence
from contextlib import closing
from functools import reduce
from itertools import product
from pathlib import Path

import torch
from rich.progress import BarColumn, TextColumn

from fluxfast.config.schema import (
    THRESHOLD_PRESET,
    Drawing,
    ModelConfig,
    SampleConfig,
    SampleLoRA,
    ThresholdConfig,
    validated,
)
from fluxfast.config.yaml_io import check_texts, parse_yaml, read_layers
from fluxfast.data.cache import Encoding, encode_prompts
from fluxfast.data.prepare import encoder_dtype, resolve_parts
from fluxfast.encoders.vae import Vae
from fluxfast.errors import ConfigError
from fluxfast.formats.base.load import load_resolved, resolve_device
from fluxfast.formats.lora.apply import load_lora
from fluxfast.model.flux import Flux
from fluxfast.model.init import hollow
from fluxfast.model.lora import lora_layers
from fluxfast.rng import settle_seed
from fluxfast.sampling.draw import check_picture, draw_picture, read_embedding
from fluxfast.sampling.picture import Picture, pictures_of, save_picture, settings_of
from fluxfast.sampling.sampler import pass_graphs
from fluxfast.sampling.sheet import contact_sheet
from fluxfast.util.files import check_no_links, check_writable, shared_lock
from fluxfast.util.hub import fetch_lora
from fluxfast.util.terminal import progress_bars

_MOST_CELLS = 64


def generate(
    model: ModelConfig, pictures: list[Picture], out: Path, device: str = "auto"
) -> list[Path]:
    """Draws `pictures`, each saved when it is drawn, with its settings in the file, as
    OUT/NN-seedSEED-WORDS.png: NN counts on from the highest there, so that nothing is overwritten.
    Text encoders, transformer and VAE are loaded once, embeddings of prompts stay in OUT/cache.
    Returns the files.

    Raises FluxfastError for a model, LoRA or picture that cannot be used, and ConfigError for a
    size or a precision, before anything is drawn.
    """
    where = resolve_device(device)
    check_writable(out)
    for picture in pictures:
        check_picture(picture)
    resolved, root, length = resolve_parts(model, where)
    files_of = {each.model_dump_json(): each for p in pictures for each in p.options.loras}
    apply_loras(hollow(resolved.spec), list(files_of.values()))  # they fit: seen before it is read
    dtype, cache = encoder_dtype(where), out / "cache"
    check_no_links(cache, "text")
    prompts = {prompt for picture in pictures for prompt in picture.prompts}
    with shared_lock(cache, "text"):
        texts = encode_prompts(prompts, cache, Encoding(root, length, where, dtype))
    flux = load_resolved(resolved, where, double_quant=model.double_quant)
    files, loras, graphs = [], [], pass_graphs(flux, where)
    more = model.model_dump(mode="json", exclude_defaults=True, exclude={"path"})
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[speed]}")
    with closing(Vae(root, where, dtype)) as vae, progress_bars(*columns, transient=True) as bars:
        for number, picture in enumerate(pictures, start=1):
            if picture.options.loras != loras:
                loras = picture.options.loras
                apply_loras(flux, loras)
                graphs.drop()
                graphs.cool()  # other kernels
            pairs = [read_embedding(texts[prompt]) for prompt in picture.prompts]
            task = bars.add_task(f"picture {number} of {len(pictures)}", speed="")

            def progress(done: int, total: int, seconds: float) -> None:
                speed = f"{done} of {total} steps, {seconds:.2f} s a step"
                bars.update(task, completed=done, total=total, speed=speed)  # noqa: B023

            image = draw_picture(flux, vae, picture, pairs, progress, graphs)
            bars.remove_task(task)
            files.append(_reserve(out, f"seed{picture.seed}-{_words(picture.prompt)}.png"))
            hashed = {"image_hash": hash_of(picture.options.image)} if picture.options.image else {}
            save_picture(files[-1], image, picture, model=model.path, **more, **hashed)
    del flux
    if where.type == "cuda":
        torch.cuda.empty_cache()
    return files


def redrawn(file: Path, model: str | None = None) -> tuple[ModelConfig, Picture]:
    """Returns the model and the picture that a PNG of ours holds. model: another one.

    Raises ConfigError where it holds none, or cannot: a preview does not hold its run's LoRA.
    """
    settings = settings_of(file)
    if not settings:
        raise ConfigError(f"{file} is no picture of `fluxfast sample`")
    if "run" in settings:
        raise ConfigError(
            f"{file} is a preview of the run {settings['run']}, whose LoRA is not in it",
            hint="--model, --lora, --prompt and the other options draw it",
        )
    image = settings.get("image")
    if settings.pop("image_hash", None) not in (None, image and hash_of(Path(image))):
        raise ConfigError(f"{image}, which {file} began with, has changed")
    parts = {key: settings[key] for key in ModelConfig.model_fields if key in settings}
    parts["path"] = model or settings.get("model")
    return validated(ModelConfig, parts, str(file)), Picture.from_settings(settings, str(file))


def hash_of(file: Path) -> str | None:
    """Returns the hash of a file's content, None where there is none."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else None


def sample(given: dict, written: set[str]) -> list[Path]:
    """Draws what the options of `fluxfast sample` ask for, of which `written` were not left out.
    Returns the files.
    """
    out, again, grid = given.pop("out"), given.pop("from_"), given.pop("grid")
    path, prompts, layers = given.pop("model"), given.pop("prompt"), given.pop("layers")
    if again is not None:
        if more := sorted(written - {"from_", "model", "out"}):
            names = ", ".join(f"--{name.replace('_', '-')}" for name in more)
            raise ConfigError(f"--from has all settings: it takes no {names}")
        parts, picture = redrawn(again, path)
        return generate(parts, [picture], out)
    if path is None or not path.strip() or not prompts:
        raise ConfigError(
            "sample takes --model and --prompt, or --from",
            hint="--model black-forest-labs/FLUX.1-dev",
        )
    precision = {key: given.pop(key) for key in ("storage", "compute")}
    roles = read_layers(layers) if layers else {}
    parts = ModelConfig(path=path, encoders=given.pop("encoders"), layers=roles)
    # not validated here: where they are resolved, an error names what is allowed
    parts = parts.model_copy(update=precision)
    files, strengths = given.pop("lora"), given.pop("lora_strength")
    if len(strengths) not in (1, len(files)) or ("lora_strength" in written and not files):
        raise ConfigError(
            f"{len(strengths)} strengths for {len(files)} LoRAs",
            hint="give one --lora-strength for each",
        )
    keys = {text.partition("=")[0] for text in grid}
    if given["strength"] is not None and given["image"] is None and "image" not in keys:
        raise ConfigError(
            "--strength is how much of --image is drawn anew",
            hint="that of a LoRA is --lora-strength",
        )
    strengths = strengths * len(files) if len(strengths) == 1 else strengths
    raw = {key: str(v) if isinstance(v, Path) else v for key, v in given.items() if v is not None}
    raw |= {"prompts": prompts, "seed": settle_seed(given["seed"])}
    pairs = zip(map(str, files), strengths, strict=True)
    raw["loras"] = [{"file": file, "strength": strength} for file, strength in pairs]
    if (text := given["threshold"]) and text != "preset":
        raw["threshold"] = parse_yaml(text)
    texts = {"prompt": prompts, "model": path, "grid": grid, **raw}
    texts = {f"--{key.replace('_', '-')}": value for key, value in texts.items()}
    check_texts(texts)  # they are written into the pictures
    return draw_sheets(parts, raw, grid, out)


def draw_sheets(model: ModelConfig, raw: dict, grid: Sequence[str], out: Path) -> list[Path]:
    """Draws the pictures of the settings `raw` of a `sample` section, or with `grid`, one or two
    KEY=A,B,…, one for each value of a key (and of the second), and a sheet of them for each prompt,
    OUT/NN-grid-WORDS.png. Returns the files.

    A key is one of the section, of its threshold, lora or lora_strength. Raises ConfigError.
    """
    axes = [_axis(each) for each in grid]
    (key, values), (other, others) = (*axes, ("", [None]), ("", [None]))[:2]
    cells = len(raw["prompts"]) * len(values) * len(others)
    if axes and (len(axes) > 2 or key == other or cells > _MOST_CELLS):
        raise ConfigError(
            f"a grid of {len(axes)} settings ({', '.join(key for key, _ in axes)}) and {cells} "
            "pictures",
            hint=f"--grid is given for one or two settings, {_MOST_CELLS} pictures at most",
        )
    pictures: list[Picture] = []
    for y, x in product(others, values):
        chosen = sorted([(other, y), (key, x)], key=lambda pair: pair[0] != "lora")
        cell = {"guidance": 3.5} | reduce(lambda cell, pair: _with(cell, *pair), chosen, raw)
        pictures += pictures_of(validated(SampleConfig, cell, "the settings of sample"))
    files, sheets = generate(model, pictures, out), []
    for number in range(len(raw["prompts"]) if axes else 0):
        own, prompt = files[number :: len(raw["prompts"])], pictures[number].prompt
        rows = [
            (f"{other} {_title(y)}" if other else prompt, own[row * len(values) :][: len(values)])
            for row, y in enumerate(others)
        ]
        sheets.append(_reserve(out, f"grid-{_words(prompt)}.png"))
        contact_sheet(rows, [f"{key} {_title(x)}" for x in values], sheets[-1])
    return files + sheets


_TEXTS = {"lora", "image", "mask", "negative"}  # values of a grid that are taken as they are


def _axis(text: str) -> tuple[str, list]:
    """Returns the key and the values of KEY=A,B,…, in quotes where they hold a comma."""
    key, equals, values = text.partition("=")
    known = {*Drawing.model_fields, *ThresholdConfig.model_fields, "lora", "lora_strength"}
    known |= {"seed", "width", "height", "steps", "guidance"}
    if not equals or not values or key not in known - {"loras", "threshold"}:
        raise ConfigError(
            f"--grid {text}: takes KEY=A,B,… of a setting of a picture",
            hint=f"such as --grid cfg=1,3,6; known are {', '.join(sorted(known))}",
        )
    (words,) = csv.reader([values])
    return key, words if key in _TEXTS else [parse_yaml(word) for word in words]


def _title(value: object) -> str:
    """Returns what a sheet calls a value: of a path the name."""
    return Path(value).name or "none" if isinstance(value, str) else str(value)


def _with(raw: dict, key: str, value) -> dict:
    """Returns the settings with one more."""
    loras = raw.get("loras") or []
    if key in ThresholdConfig.model_fields:
        given = raw.get("threshold")
        given = THRESHOLD_PRESET if given == "preset" else given
        return raw | {"threshold": {**(given if isinstance(given, dict) else {}), key: value}}
    if key == "lora":  # in place of the first
        first = [(loras or [{}])[0] | {"file": value}] if value else []
        return raw | {"loras": first + loras[1:]}
    if key == "lora_strength":
        if not loras:
            raise ConfigError("--grid lora_strength: there is no LoRA", hint="--lora FILE")
        return raw | {"loras": [each | {"strength": value} for each in loras]}
    if key == "seed":
        value = settle_seed(value) if isinstance(value, int) else value
    return raw | {key: value if value != "" or key == "negative" else None} if key else raw


def apply_loras(model: Flux, loras: list[SampleLoRA]) -> None:
    """Puts LoRAs on a model in place of its own, added up, each times its strength."""
    if loras:
        load_lora(model, [fetch_lora(each.file) for each in loras], [e.strength for e in loras])
    else:
        for layer in lora_layers(model).values():
            layer.remove_lora()


def _words(prompt: str) -> str:
    """Returns what a file's name has of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "picture"


def _reserve(folder: Path, name: str) -> Path:
    """Creates the empty file NN-NAME in `folder`, for this process alone."""
    counted = (re.match(r"(\d+)-", file.name) for file in folder.glob("*.png"))
    number = max((int(match[1]) + 1 for match in counted if match), default=0)
    while True:
        try:
            (path := folder / f"{number:02d}-{name}").touch(exist_ok=False)
            return path
        except FileExistsError:
            number += 1
