"""Datasets: a folder becomes captioned images with masks, buckets and variants."""

from .augmentation import Variant, variants
from .buckets import MAX_RESOLUTION, MIN_RESOLUTION, bucket_sizes, parse_resolutions
from .decoding import cropped_fraction, load_image, upscale_factor
from .encoding_cache import EncodingCache
from .folder import folder_fingerprint, natural_key, scan_folder
from .image import CaptionedImage, Scan
from .masks import at_latent_size, is_black, load_mask

__all__ = [
    "CaptionedImage",
    "EncodingCache",
    "MAX_RESOLUTION",
    "MIN_RESOLUTION",
    "Scan",
    "Variant",
    "at_latent_size",
    "bucket_sizes",
    "cropped_fraction",
    "folder_fingerprint",
    "is_black",
    "load_image",
    "load_mask",
    "natural_key",
    "parse_resolutions",
    "scan_folder",
    "upscale_factor",
    "variants",
]
