"""A folder of images becomes captioned images in buckets."""

from .augmentation import Variant, variants
from .buckets import parse_resolutions, bucket_sizes
from .decoding import cropped_fraction, upscale_factor, load_image
from .encoding_cache import EncodingCache
from .folder import folder_fingerprint, natural_key, scan_folder
from .image import CaptionedImage, Scan
from .masks import at_latent_size, is_black, load_mask

__all__ = [
    "CaptionedImage",
    "EncodingCache",
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
