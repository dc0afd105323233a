"""kohya's dataset keys: the key of `data` that each becomes, or why it is not read.

`fluxfast/config/kohya.py` reads a file by these rows.
"""

import math

from fluxfast.config.key_table import KeyTable, Mapped, flag, number, text, whole


def count(value) -> int:
    if (value := whole(value)) < 0:
        raise ValueError("takes a whole number of 0 or more")
    return value


def share(value) -> float:
    if not 0.0 <= number(value) <= 1.0:
        raise ValueError("takes a number from 0 to 1")
    return number(value)


def side(value) -> int:
    """Returns a side, or the side of the square that has the area of [width, height]."""
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or min(whole(length) for length in sides) < 64:
        raise ValueError("takes a side of 64 or more, or [width, height]")
    return math.isqrt(whole(sides[0]) * whole(sides[1]))


def alpha(value) -> str:
    return "alpha" if flag(value) else "none"


_MAPPED = {
    "image_dir": Mapped("folder", text),
    "resolution": Mapped("resolution", side),
    "num_repeats": Mapped("num_repeats", whole, 1),
    "caption_extension": Mapped("caption_ext", text, ".caption"),
    "class_tokens": Mapped("default_caption", text),
    "caption_prefix": Mapped("caption_prefix", text),
    "caption_suffix": Mapped("caption_suffix", text),
    "caption_dropout_rate": Mapped("caption_dropout", share, 0.0),
    "shuffle_caption": Mapped("shuffle_captions", flag, False),
    "keep_tokens": Mapped("keep_tokens", count, 0),
    "flip_aug": Mapped("flip", flag, False),
    "alpha_mask": Mapped("mask", alpha, "none"),
}

# one value for the whole run, outside `data`
OUTSIDE = {
    "batch_size": Mapped("train.batch_size", whole),
    "validation_split": Mapped("validation.share", share),
}

_NOTED = {
    "shuffle_caption": "a few orders are drawn once for each picture (data.shuffle_variants), not "
    "a new one each time; a trigger put in front counts as one of keep_tokens",
    "alpha_mask": "transparent places are painted white; kohya keeps the colors hidden there",
}

_IGNORED = """
read as true: pictures keep their aspect in buckets | enable_bucket=true
read as true: pictures are never enlarged | bucket_no_upscale=true
ignored, buckets are of at most resolution² pixels on a 32-pixel grid | min_bucket_reso
    max_bucket_reso bucket_reso_steps=32
ignored, smaller pictures stay in, at their own size | skip_image_resolution
ignored, pictures are resized by Lanczos' filter | resize_interpolation
ignored, every data set trains the LoRA at full strength | network_multiplier=1
ignored, the configuration's seed chooses the held-out pictures | validation_seed
ignored, pictures are not augmented but for flip_aug | color_aug face_crop_aug_range
ignored, pictures are cropped at the center | random_crop
ignored, captions are used whole | caption_tag_dropout_rate token_warmup_min=0|1 token_warmup_step
ignored, caption_dropout_rate is the one dropout | caption_dropout_every_n_epochs
ignored, nothing here reads it | custom_attributes
ignored, sizes and encoded captions are cached by content | cache_info
"""

# ignoring these would train something else
_REFUSED = """
is not supported, there is no training on regularization pictures: remove the subset, or is_reg to
    train on it like on any other | is_reg
is not supported: write the captions to files beside the pictures | metadata_file
is not supported, ControlNets are not trained | conditioning_data_dir
is not supported: write one caption without {a|b} in each file | enable_wildcard
is not supported: take it out of the captions | secondary_separator
"""
# refused where captions are shuffled; kohya reads them only there
SHUFFLING = """
is not supported together with shuffle_caption: give keep_tokens | keep_tokens_separator
is not supported together with shuffle_caption: parts end at commas | caption_separator=,
"""

# where a key may stand: those of subsets there alone, those of data sets not in subsets
OF_SUBSETS = ("image_dir", "is_reg", "alpha_mask", "metadata_file", "conditioning_data_dir")
OF_DATASETS = (
    "batch_size", "enable_bucket", "bucket_no_upscale", "bucket_reso_steps", "min_bucket_reso",
    "max_bucket_reso", "resolution", "skip_image_resolution", "network_multiplier",
    "validation_split", "validation_seed",
)  # fmt: skip

_COMBINED = "keep_tokens_separator caption_separator batch_size validation_split"
TABLE = KeyTable(_MAPPED, _IGNORED, _REFUSED, _NOTED, _COMBINED)

UNREAD = (".bmp", ".avif", ".jxl")  # pictures that kohya reads and fluxfast does not
