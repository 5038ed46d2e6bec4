"""Files and bodies that are made to hurt whoever reads them."""

from __future__ import annotations

import struct
import zlib

ZEROS = bytes(1 << 20)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, pixels: bytes = b"") -> bytes:
    """A PNG that claims to be so large, with chunks of one's own, and what it has of pixels, deflated."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def deflated_zeros(mebibytes: int) -> bytes:
    """So much of nothing, in little."""
    packer = zlib.compressobj(9)
    return b"".join([*(packer.compress(ZEROS) for _ in range(mebibytes)), packer.flush()])


def text_bomb(kind: bytes, mebibytes: int) -> bytes:
    """A compressed text, or colour profile, of a PNG."""
    packed = deflated_zeros(mebibytes)
    heads = {b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0", b"iCCP": b"profile\0\0"}
    return chunk(kind, heads[kind] + packed)


def gif(width: int, height: int, inner: tuple[int, int]) -> bytes:
    """A GIF whose first frame claims to be larger than its screen."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, *inner, 0) + b"\x02\x02\x44\x01\x00;"


def jpeg(width: int, height: int) -> bytes:
    """The head of a JPEG."""
    frame = struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\x00"
    return b"\xff\xd8\xff\xc0" + frame + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\xff\xd9"


def webp(width: int, height: int) -> bytes:
    """The head of a WebP of the extended kind, animated, with one frame."""
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + sides
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    lossless = b"\x2f" + struct.pack("<I", ((width - 1) & 0x3FFF) | (((height - 1) & 0x3FFF) << 14)) + bytes(16)
    frame = bytes(6) + sides + bytes(4) + b"VP8L" + struct.pack("<I", len(lossless)) + lossless
    body += b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n%%EOF\n"

FILES = {
    "a png of 10 gigapixels": png(100_000, 100_000),
    "a png of 89 megapixels": png(9_400, 9_400),
    "a png that is one long row": png(2**31 - 1, 1),
    "a png with a bomb of text": png(8, 8, text_bomb(b"zTXt", 20), pixels=deflated_zeros(1)),
    "a png with a bomb of international text": png(8, 8, text_bomb(b"iTXt", 20), pixels=deflated_zeros(1)),
    "a png with a bomb of a profile": png(8, 8, text_bomb(b"iCCP", 20), pixels=deflated_zeros(1)),
    "a png of many texts": png(8, 8, *[text_bomb(b"zTXt", 1)] * 70, pixels=deflated_zeros(1)),
    "a gif of 4 gigapixels": gif(65_535, 65_535, (1, 1)),
    "a gif whose frame is larger than it": gif(1, 1, (65_535, 65_535)),
    "a jpeg of 4 gigapixels": jpeg(65_535, 65_535),
    "a webp of 268 megapixels": webp(16_383, 16_383),
    "a postscript program": EPS,
    "nothing": b"\0",
    "a text": b"file:///etc/passwd",
}

ENDLESS = png(16, 16, pixels=deflated_zeros(20))
"""Its pixels go on long after those that it says it has."""
