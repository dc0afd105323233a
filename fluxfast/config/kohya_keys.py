"""kohya's dataset keys, one row each: the key of `data` it becomes, or why it is not read.

`fluxfast/config/kohya.py` walks a file through these rows.
"""

import math
from collections.abc import Callable
from typing import Any

from fluxfast.config.ai_toolkit_keys import flag, number, text, whole

# ---------------------------------------------------------------- readers: value -> value


def count(value) -> int:
    if (value := whole(value)) < 0:
        raise ValueError("takes a whole number of 0 or more")
    return value


def share(value) -> float:
    if not 0.0 <= number(value) <= 1.0:
        raise ValueError("takes a number from 0 to 1")
    return number(value)


def side(value) -> int:
    """A side, or the side of the square that has the area of [width, height]."""
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or min(whole(length) for length in sides) < 64:
        raise ValueError("takes a side of 64 or more, or [width, height]")
    return math.isqrt(whole(sides[0]) * whole(sides[1]))


def alpha(value) -> str:
    return "alpha" if flag(value) else "none"


# ---------------------------------------------------------------- the table of their keys


def _keys(words: str) -> list[str]:
    return words.split()


# key -> (key of `data`, reader, kohya's default; None: nothing is written)
MAPPED: dict[str, tuple[str, Callable, Any]] = {
    "image_dir": ("folder", text, None),
    "resolution": ("resolution", side, None),
    "num_repeats": ("num_repeats", whole, 1),
    "caption_extension": ("caption_ext", text, ".caption"),
    "class_tokens": ("default_caption", text, None),
    "caption_prefix": ("caption_prefix", text, None),
    "caption_suffix": ("caption_suffix", text, None),
    "caption_dropout_rate": ("caption_dropout", share, 0.0),
    "shuffle_caption": ("shuffle_captions", flag, False),
    "keep_tokens": ("keep_tokens", count, 0),
    "flip_aug": ("flip", flag, False),
    "alpha_mask": ("mask", alpha, "none"),
}

# one value for the whole run, outside `data`
OUTSIDE = {
    "batch_size": ("train.batch_size", whole),
    "validation_split": ("validation.share", share),
}

# ignored, with a note unless the value is one of QUIET's or of OFF
_BUCKETS = "ignored, buckets are of at most resolution² pixels on a 32-pixel grid"
_AUGMENTED = "ignored, pictures are not augmented but for flip_aug"
_WHOLE = "ignored, captions are used whole"
IGNORED = {
    "min_bucket_reso": _BUCKETS,
    "max_bucket_reso": _BUCKETS,
    "bucket_reso_steps": _BUCKETS,
    "skip_image_resolution": "ignored, smaller pictures stay in, at their own size",
    "resize_interpolation": "ignored, pictures are resized by Lanczos' filter",
    "network_multiplier": "ignored, every data set trains the LoRA at full strength",
    "validation_seed": "ignored, the configuration's seed chooses the held-out pictures",
    "color_aug": _AUGMENTED,
    "face_crop_aug_range": _AUGMENTED,
    "random_crop": "ignored, pictures are cropped at the center",
    "caption_tag_dropout_rate": _WHOLE,
    "caption_dropout_every_n_epochs": "ignored, caption_dropout_rate is the one dropout",
    "token_warmup_min": _WHOLE,
    "token_warmup_step": _WHOLE,
    "custom_attributes": "ignored, nothing here reads it",
    "cache_info": "ignored, sizes and encoded captions are cached by content",
}
QUIET = {
    "bucket_reso_steps": [32],
    "network_multiplier": [1],
    "token_warmup_min": [0, 1],
    "caption_separator": [","],
}

# ignoring these would train something else
REFUSED = {
    "is_reg": "is not supported, there is no training on regularization pictures: remove the "
    "subset, or is_reg to train on it like on any other",
    "metadata_file": "is not supported: write the captions to files beside the pictures",
    "conditioning_data_dir": "is not supported, ControlNets are not trained",
    "enable_wildcard": "is not supported: write one caption without {a|b} in each file",
    "secondary_separator": "is not supported: take it out of the captions",
}
# refused where captions are shuffled; kohya reads them only there
SHUFFLING = {
    "keep_tokens_separator": "is not supported together with shuffle_caption: give keep_tokens",
    "caption_separator": "is not supported together with shuffle_caption: parts end at commas",
}

# where a key may stand: those of subsets there alone, those of data sets not in subsets
OF_SUBSETS = _keys("image_dir is_reg alpha_mask metadata_file conditioning_data_dir")
OF_DATASETS = _keys("""batch_size enable_bucket bucket_no_upscale bucket_reso_steps min_bucket_reso
    max_bucket_reso resolution skip_image_resolution network_multiplier validation_split
    validation_seed""")
KNOWN = [*MAPPED, *OUTSIDE, *IGNORED, *REFUSED, *SHUFFLING, "enable_bucket", "bucket_no_upscale"]

UNREAD = (".bmp", ".avif", ".jxl")  # pictures that kohya reads and fluxfast does not
