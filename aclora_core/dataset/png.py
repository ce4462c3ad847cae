"""PNG files: their pixels without the parts that they do not need, and their metadata.

Generators write workflows of megabytes into a PNG, and some programs put the orientation behind the pixels. Pillow
refuses a file for a text that is long or has a wrong checksum, and finds the orientation only once it has decoded the
pixels. So it is given the chunks of the pixels alone, and the others are read here, leniently, as image viewers do.
"""

from __future__ import annotations

import io
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_METADATA = 16 << 20  # bytes of a profile or text, also once decompressed
MAX_CHUNKS = 1 << 18  # a file of 2 GB in the usual chunks of 8 kB
_FRAME = 12  # bytes of a chunk around its data: length, name, checksum
_EXIF_TEXTS = (b"Raw profile type exif", b"Raw profile type APP1")  # ImageMagick's EXIF as hexadecimal text
_XMP_TEXT = b"XML:com.adobe.xmp"


@dataclass
class Png:
    """A PNG file, of which the pixels have not been decoded."""

    pixels: BinaryIO  # a PNG file of the chunks that decoding needs
    deep: bool = False  # whether its samples have 16 bits
    exif: bytes | None = None
    xmp: bytes | None = None
    icc_profile: bytes | None = None
    moving: bool = False  # whether there are further frames


class _Chunk(NamedTuple):
    name: bytes
    start: int  # of its frame
    length: int  # of its data

    @property
    def needed(self) -> bool:
        """Whether decoding needs it: critical chunks have a capital letter."""
        return self.name[:1].isupper()


def read_png(file: io.FileIO) -> Png:
    """Read the metadata of a PNG file, wherever it stands, and find the chunks of its pixels.

    Metadata that is damaged or longer than MAX_METADATA is passed over.

    Args:
        file: without a buffer, since most of it is skipped.
    """
    ranges = [(0, len(SIGNATURE))]
    png = Png(io.BytesIO())
    for chunk in _chunks(file):
        if chunk.name == b"IHDR" and chunk.length == 13:
            png.deep = _data(file, chunk)[8:9] == b"\x10"
        if chunk.needed or (chunk.name == b"tRNS" and _is_intact(file, chunk)):
            ranges.append((chunk.start, chunk.start + _FRAME + chunk.length))
        elif chunk.length <= MAX_METADATA and chunk.name in _READERS and _is_intact(file, chunk):
            _READERS[chunk.name](png, _data(file, chunk))
    png.pixels = io.BufferedReader(_Ranges(file, _merged(ranges)))
    return png


def _chunks(file: io.FileIO) -> Iterator[_Chunk]:
    """The chunks up to the last one or the end of the file; a truncated one is included."""
    start = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        file.seek(start)
        head = file.read(8)
        if len(head) < 8:
            return
        length, name = struct.unpack(">I4s", head)
        yield _Chunk(name, start, length)
        start += _FRAME + length
        if name == b"IEND":
            return


def _data(file: io.FileIO, chunk: _Chunk) -> bytes:
    file.seek(chunk.start + 8)
    return file.read(chunk.length)


def _is_intact(file: io.FileIO, chunk: _Chunk) -> bool:
    if chunk.length > MAX_METADATA:
        return False
    file.seek(chunk.start + 4)
    body = file.read(4 + chunk.length)
    return file.read(4) == struct.pack(">I", zlib.crc32(body))


def _read_exif(png: Png, data: bytes) -> None:
    png.exif = png.exif or data


def _read_profile(png: Png, data: bytes) -> None:
    _, _, packed = data.partition(b"\0")  # the profile's name, then a byte for the method of compression
    png.icc_profile = png.icc_profile or _decompressed(packed[1:])


def _read_animation(png: Png, data: bytes) -> None:
    png.moving = int.from_bytes(data[:4], "big") > 1


def _read_text(png: Png, data: bytes) -> None:
    keyword, _, text = data.partition(b"\0")
    _keep_text(png, keyword, text)


def _read_compressed_text(png: Png, data: bytes) -> None:
    keyword, _, packed = data.partition(b"\0")
    if keyword in _EXIF_TEXTS:  # most other texts are long and of no use here
        _keep_text(png, keyword, _decompressed(packed[1:]))


def _read_international_text(png: Png, data: bytes) -> None:
    keyword, _, rest = data.partition(b"\0")
    if keyword != _XMP_TEXT:
        return
    packed, rest = rest[:1] == b"\1", rest[2:]
    text = rest.split(b"\0", 2)[-1]  # after a language and a translated keyword
    _keep_text(png, keyword, _decompressed(text) if packed else text)


def _keep_text(png: Png, keyword: bytes, text: bytes | None) -> None:
    if text is None:
        return
    if keyword == _XMP_TEXT:
        png.xmp = png.xmp or text
    elif keyword in _EXIF_TEXTS:
        png.exif = png.exif or _from_hexadecimal(text)


_READERS = {
    b"eXIf": _read_exif,
    b"iCCP": _read_profile,
    b"acTL": _read_animation,
    b"tEXt": _read_text,
    b"zTXt": _read_compressed_text,
    b"iTXt": _read_international_text,
}


def _from_hexadecimal(text: bytes) -> bytes | None:
    """The content of a raw profile: an empty line, its name, its length, and its bytes in hexadecimal."""
    try:
        return bytes.fromhex("".join(text.decode("ascii").split("\n")[3:]))
    except ValueError:
        return None


def _decompressed(packed: bytes) -> bytes | None:
    """Decompress at most MAX_METADATA bytes; None if there are more or the data is damaged."""
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(packed, MAX_METADATA)
    except zlib.error:
        return None
    return data if unpacker.eof else None


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged = ranges[:1]
    for start, end in ranges[1:]:
        if start == merged[-1][1]:
            merged[-1] = merged[-1][0], end
        else:
            merged.append((start, end))
    return merged


class _Ranges(io.RawIOBase):
    """Some ranges of a file, one after the other, as a file that can be read.

    Args:
        file: the file.
        ranges: (start, end) of each range in bytes.
    """

    def __init__(self, file: io.FileIO, ranges: list[tuple[int, int]]) -> None:
        self._file = file
        self._ranges = ranges
        self._offsets = [0]  # where each range begins in this file, and where the last one ends
        for start, end in ranges:
            self._offsets.append(self._offsets[-1] + end - start)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._offsets[-1]}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        index = bisect_right(self._offsets, self._position) - 1
        if index >= len(self._ranges):
            return 0
        view = memoryview(buffer)
        inside = self._position - self._offsets[index]
        self._file.seek(self._ranges[index][0] + inside)
        data = self._file.read(min(len(view), self._offsets[index + 1] - self._position))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)
