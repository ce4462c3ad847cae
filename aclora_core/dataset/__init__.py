"""Datasets: a folder becomes captioned images with masks, buckets and variants."""

from .augmentation import Variant, variants
from .buckets import MAX_RESOLUTION, MIN_RESOLUTION, bucket_sizes, parse_resolutions
from .captions import CaptionLines
from .decoding import cropped_fraction, load_image, upscale_factor
from .encoding_cache import EncodingCache
from .folder import folder_fingerprint, ignored_repeats, natural_key, scan_folder
from .image import CaptionedImage, Scan
from .masks import at_latent_size, is_black, load_mask
from .tags import clean_trigger, split_tags

__all__ = [
    "CaptionLines",
    "CaptionedImage",
    "EncodingCache",
    "MAX_RESOLUTION",
    "MIN_RESOLUTION",
    "Scan",
    "Variant",
    "at_latent_size",
    "bucket_sizes",
    "clean_trigger",
    "cropped_fraction",
    "folder_fingerprint",
    "ignored_repeats",
    "is_black",
    "load_image",
    "load_mask",
    "natural_key",
    "parse_resolutions",
    "scan_folder",
    "split_tags",
    "upscale_factor",
    "variants",
]
