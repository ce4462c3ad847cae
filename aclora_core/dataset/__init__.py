"""Datasets: a folder becomes captioned images with masks, buckets and variants."""

from .augmentation import Variant, variants
from .browsing import Browsed, BrowsedImage, browse_folder, browse_image
from .buckets import MAX_RESOLUTION, MIN_RESOLUTION, bucket_sizes, parse_resolutions
from .caption_files import CaptionChangedError, CaptionText, read_caption, save_caption
from .captions import CaptionLines, ImageFiles
from .decoding import cropped_fraction, load_image, upscale_factor
from .encoding_cache import EncodingCache
from .finding import find_image, ignored_repeats, natural_key
from .folder import folder_fingerprint, scan_folder
from .image import CaptionedImage, Scan
from .masks import at_latent_size, is_black, load_mask
from .opening import read_header
from .tags import clean_trigger, split_tags

__all__ = [
    "Browsed",
    "BrowsedImage",
    "CaptionChangedError",
    "CaptionLines",
    "CaptionText",
    "CaptionedImage",
    "EncodingCache",
    "ImageFiles",
    "MAX_RESOLUTION",
    "MIN_RESOLUTION",
    "Scan",
    "Variant",
    "at_latent_size",
    "browse_folder",
    "browse_image",
    "bucket_sizes",
    "clean_trigger",
    "cropped_fraction",
    "find_image",
    "folder_fingerprint",
    "ignored_repeats",
    "is_black",
    "load_image",
    "load_mask",
    "natural_key",
    "parse_resolutions",
    "read_caption",
    "read_header",
    "save_caption",
    "scan_folder",
    "split_tags",
    "upscale_factor",
    "variants",
]
