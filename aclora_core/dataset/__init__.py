"""A folder of images becomes captioned images in buckets."""

from .augmentation import Variant, variants
from .buckets import parse_resolutions, sizes_of
from .decoding import cropped_share, enlargement, load_image
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
    "cropped_share",
    "enlargement",
    "folder_fingerprint",
    "is_black",
    "load_image",
    "load_mask",
    "natural_key",
    "parse_resolutions",
    "scan_folder",
    "sizes_of",
    "variants",
]
