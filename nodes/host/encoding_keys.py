"""What the VAE and the CLIP gave for the same pictures and captions before, also before a restart of ComfyUI."""

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

VERSION = 1  # raise it whenever images.load_image gives other pixels, or the node hands other things to the VAE or CLIP
# A VAE's and a text encoder's own settings, as far as they change what it gives.
_VAE_OPTIONS = ("vae_dtype", "crop_input", "latent_channels", "latent_dim", "extra_1d_channel")
_CLIP_OPTIONS = ("layer_idx", "tokenizer_options", "use_clip_schedule", "apply_hooks_to_conds")
_ENCODER_OPTIONS = ("options_default", "enable_attention_masks", "zero_out_masked", "layer_norm_hidden_state")
# Of the host's patcher: what lies on top of the weights. Functions among it cannot be recognised: they end the cache.
_ON_TOP = (
    "object_patches",
    "weight_wrapper_patches",
    "model_options",
    "wrappers",
    "injections",
    "additional_models",
    "forced_hooks",
    "hook_patches",
)

logger = logging.getLogger("aclora")


def cache_folder() -> Path:
    """In the user folder, which survives restarts; names with "__" are not served over HTTP."""
    return Path(folder_paths.get_system_user_directory("aclora"), "encodings")


class KnownEncodings:
    """Keys for pictures and captions, and the values stored under them; a key of None is never found nor stored."""

    def __init__(self, vae: Any, clip: Any, enabled: bool = True) -> None:
        self._files = EncodingCache(cache_folder())
        self._found, self._new = 0, 0
        self._contents: dict[Path, tuple[tuple[int, int], str]] = {}  # of files, by their time and size
        self._vae = _recognised("VAE", lambda: _vae_hash(vae)) if enabled else None
        self._clip = _recognised("CLIP", lambda: _clip_hash(clip)) if enabled else None

    @property
    def problems(self) -> list[str]:
        """Why not all could be kept, in sentences for the user."""
        return [self._files.problem] if self._files.problem else []

    def log(self) -> None:
        """Says how much was known."""
        if self._found:
            logger.info("AC-LoRA: %d pictures and captions were encoded before, %d anew.", self._found, self._new)

    def picture_key(self, picture: CaptionedImage, mirrored: bool, bucket: tuple[int, int]) -> str | None:
        """By the file's bytes and the size it is brought to, which takes far less time than decoding it."""
        if self._vae is None:
            return None
        try:
            content = self._content(picture.path)
        except OSError:  # gone or locked: reading it says so
            return None
        return content_hash("picture", self._vae, content, bucket, mirrored)

    def _content(self, path: Path) -> str:
        """The hash of a file, which is read again only when it has changed."""
        state = path.stat()
        sign = state.st_mtime_ns, state.st_size
        if path not in self._contents or self._contents[path][0] != sign:
            self._contents[path] = sign, _file_hash(path)
        return self._contents[path][1]

    def caption_key(self, tokens: Any) -> str | None:
        """By what the tokenizer made of the caption, with the embeddings that it names."""
        if self._clip is None:
            return None
        try:
            return content_hash("caption", self._clip, tokens)
        except UnhashableError:
            return None

    def get(self, key: str | None) -> Any | None:
        """Return a stored encoding, and count whether it was there; None is never there."""
        value = None if key is None else self._files.get(key)
        self._found, self._new = self._found + (value is not None), self._new + (value is None)
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


def _recognised(name: str, hashed: Callable[[], str]) -> str | None:
    try:
        return hashed()
    # Other packs bring VAEs and CLIPs of their own making; one that is put together otherwise is encoded each time.
    except (TypeError, AttributeError, ValueError, RuntimeError, OSError) as error:
        logger.info("AC-LoRA: what this %s encodes is not kept for the next time: %s.", name, error)
        return None


def _vae_hash(vae: Any) -> str:
    options = [getattr(vae, name, None) for name in _VAE_OPTIONS]
    if hasattr(vae, "vae_output_dtype"):  # follows the server's command line
        options.append(vae.vae_output_dtype())
    return content_hash(VERSION, options, _code([vae], vae.patcher.model), *_patcher_parts(vae.patcher))


def _clip_hash(clip: Any) -> str:
    options = [getattr(clip, name, None) for name in _CLIP_OPTIONS]
    encoders = [
        [name, *(getattr(part, option, None) for option in _ENCODER_OPTIONS)]
        for name, part in clip.patcher.model.named_modules()
        if hasattr(part, _ENCODER_OPTIONS[0])
    ]
    code = _code([clip, clip.tokenizer], clip.patcher.model)
    return content_hash(VERSION, options, encoders, code, *_patcher_parts(clip.patcher))


def _patcher_parts(patcher: Any) -> list[Any]:
    """The network's kinds of modules, its weights, and all that the patcher would put on top of them."""
    kinds = [(name, type(part).__module__, type(part).__qualname__) for name, part in patcher.model.named_modules()]
    on_top = [_plain(getattr(patcher, name, None)) for name in _ON_TOP]
    patches = {key: _plain(patch) for key, patch in patcher.patches.items()}
    return [kinds, weights_hash(_weights(patcher)), on_top, patches, torch.device(patcher.load_device).type]


def _weights(patcher: Any) -> Iterator[tuple[str, Tensor, torch.dtype | None]]:
    """The weights as loaded from the file, whatever patches of this or another node are in place just now."""
    modules = dict(patcher.model.named_modules())
    hooked = {name: weight for name, (weight, _) in patcher.hook_backup.items()}
    kept = {name: entry.weight for name, entry in patcher.backup.items()}
    originals = {**patcher.backup_buffers, **hooked, **kept}
    for stored in (patcher.model.named_parameters(), patcher.model.named_buffers()):
        for name, tensor in stored:
            owner, _, leaf = name.rpartition(".")
            yield name, originals.get(name, tensor), getattr(modules[owner], f"{leaf}_comfy_model_dtype", None)


def _plain(value: Any) -> Any:
    """Patches in lists and dicts, with the host's LoRA objects as their kind and tensors."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "loaded_keys") and hasattr(value, "weights"):
        return [type(value).__qualname__, _plain(value.weights)]
    return value


def _code(wrappers: list[Any], model: torch.nn.Module) -> str:
    """The content of the files that define these objects' classes: an update may encode otherwise than before."""
    classes = {type(each) for each in (*wrappers, *model.modules())}
    files = {getattr(sys.modules.get(each.__module__), "__file__", None) for each in classes}
    contents = {Path(file).read_bytes() for file in files if file and Path(file).suffix == ".py"}
    return content_hash(contents)
