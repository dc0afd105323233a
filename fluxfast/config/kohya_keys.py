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
    "conditioning_data_dir": Mapped("mask_folder", text),
}

# one value for the whole run, outside `data`, unless data sets have batches of their own
OUTSIDE = {
    "batch_size": Mapped("train.batch_size", whole, 1),
    "validation_split": Mapped("validation.share", share, 0.0),
}

_MEAN = "weights have mean 1 in each picture, so that a masked one does not count for less"

_NOTED = {
    "shuffle_caption": "a few orders are drawn once for each picture (data.shuffle_variants), not "
    "a new one each time; a trigger put in front counts as one of keep_tokens",
    "alpha_mask": "transparent places are painted white, kohya keeps the colors hidden there; "
    + _MEAN,
    "conditioning_data_dir": "read as masks, as sd-scripts do with --masked_loss, their gray value "
    f"for the red channel; {_MEAN}",
}

_IGNORED = """
read as true: pictures are never enlarged | bucket_no_upscale=true
ignored, buckets are of at most resolution² pixels on a 32-pixel grid | min_bucket_reso
    max_bucket_reso bucket_reso_steps=32
ignored, pictures are resized by Lanczos' filter | resize_interpolation=lanczos
    interpolation_type=lanczos
ignored, nothing here reads it | custom_attributes
ignored, sizes and encoded captions are cached by content | cache_info
"""

# ignoring these would train something else
_REFUSED = """
is not supported, there is no training on regularization pictures: remove the subset, or is_reg to
    train on it like on any other | is_reg
is not supported: write the captions to files beside the pictures | metadata_file
is not supported, pictures keep their aspect in buckets: set it to true | enable_bucket=true
is not supported, smaller pictures stay in at their own size: remove it, and the small pictures |
    skip_image_resolution
is not supported, every data set trains the LoRA at full strength: remove it, or set num_repeats |
    network_multiplier=1
is not supported, pictures are augmented by flip_aug alone: remove it | color_aug
    face_crop_aug_range
is not supported, pictures are cropped at the center: remove it | random_crop
is not supported, captions are used whole: remove it | caption_tag_dropout_rate token_warmup_step
is not supported, caption_dropout_rate drops captions: remove it | caption_dropout_every_n_epochs
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

# token_warmup_min acts with token_warmup_step alone
_COMBINED = (
    "keep_tokens_separator caption_separator batch_size validation_split validation_seed "
    "token_warmup_min"
)
TABLE = KeyTable(_MAPPED, _IGNORED, _REFUSED, _NOTED, _COMBINED)
