"""Files of all kinds: the right picture, or one sentence."""

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qchat.core.errors import UsageError
from qchat.core.vision import picture as module
from qchat.core.vision.picture import Picture
from tests.vision_checkpoints import noise

Pixel = tuple[int, int, int]
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def halves(mode: str = "RGB", first: Any = RED, second: Any = GREEN) -> Image.Image:
    """A picture of 40 x 20 whose left half has one colour and whose right half another."""
    image = Image.new(mode, (40, 20), second)
    image.paste(first, (0, 0, 20, 20))
    return image


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, rows: bytes, *, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG file whose header says so."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(halves(), "PNG", exif=exif)


def animated(form: str) -> bytes:
    return saved(
        halves(), form, save_all=True, append_images=[halves("RGB", WHITE, WHITE)], duration=50, lossless=True
    )


def palette_with_transparency() -> bytes:
    image = Image.new("P", (40, 20), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(0, (0, 0, 20, 20))
    return saved(image, "PNG", transparency=1)


SIXTEEN_BITS = b"".join(b"\0" + b"\xff\xff" * 20 + b"\x80\x00" * 20 for _ in range(20))
# file -> the colours of its left and right half
RIGHT: dict[str, tuple[Callable[[], bytes], Pixel, Pixel]] = {
    "png": (lambda: saved(halves(), "PNG"), RED, GREEN),
    "webp": (lambda: saved(halves(), "WEBP", lossless=True), RED, GREEN),
    "gif": (lambda: saved(halves(), "GIF"), RED, GREEN),
    "animated gif": (lambda: animated("GIF"), RED, GREEN),
    "animated webp": (lambda: animated("WEBP"), RED, GREEN),
    "animated png": (lambda: animated("PNG"), RED, GREEN),
    "cmyk jpeg": (
        lambda: saved(halves("CMYK", (0, 255, 255, 0), (255, 0, 255, 0)), "JPEG", quality=95),
        RED,
        GREEN,
    ),
    "grey": (lambda: saved(halves("L", 0, 255), "PNG"), (0, 0, 0), WHITE),
    "one bit": (lambda: saved(halves("1", 0, 1), "PNG"), (0, 0, 0), WHITE),
    "16-bit grey": (lambda: png_of(40, 20, SIXTEEN_BITS, bits=16, colour=0), WHITE, (127, 127, 127)),
    "transparent": (
        lambda: saved(halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)), "PNG"),
        RED,
        WHITE,
    ),
    "half transparent": (
        lambda: saved(halves("LA", (0, 255), (0, 128)), "PNG"),
        (0, 0, 0),
        (127, 127, 127),
    ),
    "transparent palette": (palette_with_transparency, RED, WHITE),
    "mirrored by EXIF": (lambda: turned(2), GREEN, RED),
    "upside down by EXIF": (lambda: turned(3), GREEN, RED),
}


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_picture_is_seen(name: str):
    make, left, right = RIGHT[name]
    picture = Picture(make())
    image = picture.decode()
    assert picture.size == image.size == (40, 20)
    pixels = np.asarray(image).astype(int)
    for found, wanted in ((pixels[10, 5], left), (pixels[10, 35], right)):
        assert np.abs(found - wanted).max() <= 6, (found, wanted)


def test_a_picture_turned_by_exif_swaps_its_sides():
    picture = Picture(turned(6))
    assert picture.size == picture.decode().size == (20, 40)
    assert picture.decode().getpixel((10, 5)) == RED  # 6: turn it clockwise, left comes to the top


WHOLE = saved(noise(300, 200), "JPEG")
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is an empty file"),
    "text": (b"hello, I am a picture", "is not a PNG, JPEG, WebP, GIF or AVIF picture"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a PNG"),
    "tiff": (saved(halves(), "TIFF"), "is not a PNG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a PNG"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is in HEIC"),
    "truncated jpeg": (WHOLE[: len(WHOLE) // 2], "cannot be decoded"),
    "truncated png": (saved(noise(300, 200), "PNG")[:5000], "cannot be decoded"),
    "truncated webp": (saved(noise(300, 200), "WEBP")[:900], "cannot be decoded|is not a PNG"),
    "only a header": (WHOLE[:20], "cannot be decoded|is not a PNG"),
    "a bomb of zeros": (png_of(60_000, 60_000, b"\0" * 1000), "has (more than|60,000 x 60,000)"),
    "just too many pixels": (png_of(10_000, 5_001, b"\0" * 1000), "10,000 x 5,001 pixels; 1 to 50,000,000"),
    "a header that lies": (png_of(4000, 4000, b"\0" * 1000), "cannot be decoded"),
    "no width": (png_of(0, 20, b""), "is not a PNG|cannot be decoded|0 x 20"),
    "more data than pixels": (png_of(2, 2, b"\0" * (200 << 20)), ""),
    "a wrong checksum": (saved(halves(), "PNG").replace(b"IDAT", b"IDAR"), "cannot be decoded|is not a PNG"),
    "a gif of one byte": (b"GIF89a\x01", "cannot be decoded|is not a PNG"),
    "a webp of nothing": (b"RIFF\x04\0\0\0WEBP", "cannot be decoded|is not a PNG"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_in_one_sentence(name: str):
    data, words = HOSTILE[name]
    picture = Picture(data, "photo.png")
    if words:
        with pytest.raises(UsageError, match=words) as caught:
            picture.decode()
        assert str(caught.value).startswith("photo.png ")
        assert "\n" not in str(caught.value)
    else:
        assert picture.decode().size == picture.size


def test_a_file_beyond_the_limit_is_refused_before_pillow_sees_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_NBYTES", 100)
    with pytest.raises(UsageError, match=r"photo.png has [\d,]+ bytes; 100 are allowed"):
        Picture(WHOLE, "photo.png").decode()


def test_without_pillow_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(UsageError, match=r"pictures need Pillow: pip install"):
        Picture(WHOLE).decode()


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_thumbnail_is_the_picture_in_few_pixels(form: str):
    large = halves().resize((2000, 1000), Image.Resampling.NEAREST)
    found = Picture(saved(large, form)).thumbnail
    assert (found.width, found.height) == (32, 16)
    rows = [found.pixels[begin : begin + 6 * 32] for begin in range(0, len(found.pixels), 6 * 32)]
    for row in rows:
        for place, wanted in ((0, RED), (31, GREEN)):
            pixel = bytes.fromhex(row[6 * place : 6 * place + 6])
            assert max(abs(a - b) for a, b in zip(pixel, wanted, strict=True)) <= 8
    with pytest.raises(UsageError, match="cannot be decoded"):
        Picture(WHOLE[: len(WHOLE) // 2]).thumbnail  # noqa: B018
