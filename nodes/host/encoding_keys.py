"""Keys of encoded images and captions, under which encodings are kept across restarts of ComfyUI."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from ...aclora_core.dataset import CaptionedImage, EncodingCache
from ...aclora_core.storage import UnhashableError, content_hash, weights_hash

VERSION = 2  # to be raised whenever load_image returns other pixels, or the VAE or CLIP is called in another way
# Settings of a VAE and of a text encoder that change its output.
_VAE_OPTIONS = ("vae_dtype", "crop_input", "latent_channels", "latent_dim", "extra_1d_channel")
_CLIP_OPTIONS = ("layer_idx", "tokenizer_options", "use_clip_schedule", "apply_hooks_to_conds")
_ENCODER_OPTIONS = ("options_default", "enable_attention_masks", "zero_out_masked", "layer_norm_hidden_state")
# Attributes of ComfyUI's patcher that change the output. Functions in them cannot be hashed, and so disable caching.
PATCHER_STATE = (
    "object_patches",
    "weight_wrapper_patches",
    "model_options",
    "wrappers",
    "injections",
    "additional_models",
    "forced_hooks",
    "hook_patches",
)

log = logging.getLogger("aclora")


def cache_folder() -> Path:
    """Return the folder of the encodings, in ComfyUI's user folder; names with "__" are not served over HTTP."""
    return Path(folder_paths.get_system_user_directory("aclora"), "encodings")


class KnownEncodings:
    """The stored encodings of one VAE and one CLIP, and the keys of images and captions.

    An encoding whose key is None is neither stored nor found.

    Args:
        vae: ComfyUI's VAE.
        clip: ComfyUI's CLIP.
        enabled: whether anything is looked up and stored.
    """

    def __init__(self, vae: Any, clip: Any, enabled: bool = True) -> None:
        self._files = EncodingCache(cache_folder())
        self._found = 0
        self._new = 0
        self._contents: dict[
            Path, tuple[tuple[int, int], str]
        ] = {}  # hashes of files, each with the file's time and size
        self._vae = _hash_or_none("VAE", lambda: _vae_hash(vae)) if enabled else None
        self._clip = _hash_or_none("CLIP", lambda: _clip_hash(clip)) if enabled else None

    @property
    def problems(self) -> list[str]:
        """Sentences for the user that say why some encodings could not be stored."""
        return [self._files.problem] if self._files.problem else []

    def log_counts(self) -> None:
        """Log how many encodings were found."""
        if self._found:
            log.info("AC-LoRA: %d encodings of images and captions were reused, %d are new.", self._found, self._new)

    def image_key(self, image: CaptionedImage, mirrored: bool, bucket: tuple[int, int]) -> str | None:
        """Return the key of an image, made of the bytes of its file, which is much faster than decoding it.

        Args:
            image: to be encoded.
            mirrored: whether it is flipped.
            bucket: width and height in pixels to which it is scaled.

        Returns:
            The key; None if the VAE cannot be hashed or the file cannot be read.
        """
        if self._vae is None:
            return None
        try:
            content = self._content(image.path)
        except OSError:  # missing or locked: loading the image reports it
            return None
        return content_hash("picture", self._vae, content, bucket, mirrored)

    def _content(self, path: Path) -> str:
        """Return the hash of a file, which is read again only if it has changed."""
        state = path.stat()
        sign = state.st_mtime_ns, state.st_size
        if path not in self._contents or self._contents[path][0] != sign:
            self._contents[path] = sign, _file_hash(path)
        return self._contents[path][1]

    def caption_key(self, tokens: Any) -> str | None:
        """Return the key of a caption, made of its tokens and the embeddings in them; None if they cannot be hashed."""
        if self._clip is None:
            return None
        try:
            return content_hash("caption", self._clip, tokens)
        except UnhashableError:
            return None

    def get(self, key: str | None) -> Any | None:
        """Return a stored encoding, or None, and count it as found or new."""
        value = None if key is None else self._files.get(key)
        if value is None:
            self._new += 1
        else:
            self._found += 1
        return value

    def put(self, key: str | None, value: Any) -> None:
        """Store an encoding, if it has a key."""
        if key is not None:
            self._files.put(key, value)


def _file_hash(path: Path) -> str:
    digest = hashlib.blake2b()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _hash_or_none(name: str, hashed: Callable[[], str]) -> str | None:
    try:
        return hashed()
    # VAEs and CLIPs of other packs may be built differently; what cannot be hashed is encoded each time.
    except (TypeError, AttributeError, ValueError, RuntimeError, OSError) as error:
        log.info("AC-LoRA: encodings of this %s are not stored: %s.", name, error)
        return None


def _vae_hash(vae: Any) -> str:
    options = [getattr(vae, name, None) for name in _VAE_OPTIONS]
    if hasattr(vae, "vae_output_dtype"):  # depends on ComfyUI's command line
        options.append(vae.vae_output_dtype())
    return content_hash(VERSION, options, _code_hash([vae], vae.patcher.model), *_patcher_parts(vae.patcher))


def _clip_hash(clip: Any) -> str:
    options = [getattr(clip, name, None) for name in _CLIP_OPTIONS]
    encoders = [
        [name, *(getattr(part, option, None) for option in _ENCODER_OPTIONS)]
        for name, part in clip.patcher.model.named_modules()
        if hasattr(part, _ENCODER_OPTIONS[0])
    ]
    code = _code_hash([clip, clip.tokenizer], clip.patcher.model)
    return content_hash(VERSION, options, encoders, code, *_patcher_parts(clip.patcher))


def _patcher_parts(patcher: Any) -> list[Any]:
    """Return what identifies a patched network: its module classes, weights, patches and type of device."""
    kinds = [(name, type(part).__module__, type(part).__qualname__) for name, part in patcher.model.named_modules()]
    state = [plain_patches(getattr(patcher, name, None)) for name in PATCHER_STATE]
    patches = {key: plain_patches(patch) for key, patch in patcher.patches.items()}
    return [kinds, weights_hash(_weights(patcher)), state, patches, torch.device(patcher.load_device).type]


def _weights(patcher: Any) -> Iterator[tuple[str, Tensor, torch.dtype | None]]:
    """Yield the names, values and types of the weights as loaded from the file, without any applied patches."""
    modules = dict(patcher.model.named_modules())
    hooked = {name: weight for name, (weight, _) in patcher.hook_backup.items()}
    kept = {name: entry.weight for name, entry in patcher.backup.items()}
    originals = {**patcher.backup_buffers, **hooked, **kept}
    for stored in (patcher.model.named_parameters(), patcher.model.named_buffers()):
        for name, tensor in stored:
            owner, _, leaf = name.rpartition(".")
            yield name, originals.get(name, tensor), getattr(modules[owner], f"{leaf}_comfy_model_dtype", None)


def plain_patches(value: Any) -> Any:
    """Return nested patches with ComfyUI's LoRA objects replaced by their class name and tensors."""
    if isinstance(value, dict):
        return {key: plain_patches(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_patches(item) for item in value]
    if hasattr(value, "loaded_keys") and hasattr(value, "weights"):
        return [type(value).__qualname__, plain_patches(value.weights)]
    return value


def _code_hash(wrappers: list[Any], model: torch.nn.Module) -> str:
    """Return a hash of the source files of these objects' classes, as an update may change the encodings."""
    classes = {type(each) for each in (*wrappers, *model.modules())}
    files = {getattr(sys.modules.get(each.__module__), "__file__", None) for each in classes}
    contents = {Path(file).read_bytes() for file in files if file and Path(file).suffix == ".py"}
    return content_hash(contents)
