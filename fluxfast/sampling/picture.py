"""A picture's settings, and the PNG file that holds them."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fluxfast.config.schema import DrawConfig, PreviewConfig, SampleConfig, validated
from fluxfast.errors import ConfigError
from fluxfast.util.files import write_atomic

NUMBERS = ("seed", "width", "height", "steps", "guidance")


@dataclass(frozen=True)
class Picture:
    """The settings of one picture. width, height in pixels."""

    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    options: DrawConfig = field(default_factory=DrawConfig)

    @property
    def prompts(self) -> list[str]:
        """The prompt, and the negative one where classifier-free guidance acts."""
        cfg = self.options.cfg
        return [self.prompt] if cfg is None or cfg == 1 else [self.prompt, self.options.negative]

    def settings(self) -> dict[str, Any]:
        """Returns what is written into its file: of the options those that are no defaults."""
        own = self.options.model_dump(mode="json", exclude_defaults=True)
        return {key: value for key, value in vars(self).items() if key != "options"} | own

    @staticmethod
    def from_settings(settings: dict[str, Any], source: str) -> "Picture":
        """Returns the picture of what `settings` wrote into the file `source`, in fluxfast 0.1 too.

        Raises ConfigError for settings that are not whole, or not of a picture.
        """
        settings = dict(settings)
        if isinstance(text := settings.get("lora"), str):  # of 0.1: strength is the LoRAs'
            files, strengths = text.split(", "), str(settings.pop("strength", 1)).split(", ")
            strengths = strengths * len(files) if len(strengths) == 1 else strengths
            if len(files) != len(strengths):  # a path with a comma
                raise ConfigError(f"the LoRAs of {source} cannot be told apart: {text}")
            pairs = zip(files, strengths, strict=True)
            settings["loras"] = [{"file": f, "strength": s} for f, s in pairs]
        options = {key: settings[key] for key in DrawConfig.model_fields if key in settings}
        own: dict[str, Any] = {key: settings.get(key) for key in ("prompt", *NUMBERS)}
        if None in own.values():
            raise ConfigError(f"{source} lacks settings of its picture")
        validated(PreviewConfig, own, source)
        return Picture(**own, options=validated(DrawConfig, options, source))


def pictures_of(settings: SampleConfig) -> list[Picture]:
    """Returns the picture of each prompt, with a seed of its own under `walk_seed`. The last ones
    are those of `samples`, with settings of their own.
    """
    pictures = []
    prompts = settings.prompts + [each.prompt for each in settings.samples]
    for index, prompt in enumerate(prompts):
        own = {key: getattr(settings, key) for key in NUMBERS}
        own["seed"] += settings.walk_seed * index
        if (place := index - len(settings.prompts)) >= 0:
            given = {key: getattr(settings.samples[place], key) for key in NUMBERS}
            own |= {key: value for key, value in given.items() if value is not None}
        pictures.append(Picture(prompt, **own, options=settings.drawn(index)))
    return pictures


def save_picture(path: Path, image: Image.Image, picture: Picture, **more: Any) -> None:
    """Write a PNG with prompt, seed and, in `fluxfast`, all settings and `more` as JSON."""
    info = PngInfo()
    info.add_itxt("prompt", picture.prompt)
    info.add_text("seed", str(picture.seed))
    info.add_itxt("fluxfast", json.dumps({**picture.settings(), **more}, ensure_ascii=False))
    image.save(buffer := io.BytesIO(), "PNG", pnginfo=info)
    write_atomic(path, buffer.getvalue())


def settings_of(file: Path) -> dict[str, Any]:
    """Returns what `save_picture` wrote into a file, nothing for any other file."""
    try:
        with Image.open(file, formats=("PNG",)) as image:
            return {**json.loads(image.info["fluxfast"])}
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def read_png(file: Path) -> Image.Image | None:
    """Returns a PNG file as RGB, None where it is another kind of file or damaged."""
    try:
        with Image.open(file, formats=("PNG",)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
