"""A picture file's bytes to upright RGB pixels, by Pillow.

Reads PNG, JPEG, WebP, GIF and AVIF, of animations the first frame; transparent pixels become white. Refuses,
in one sentence and before decoding, files and pictures beyond the limits, and what Pillow cannot decode.
"""

import hashlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..quoting import printable

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF", "HEIF")
MAX_NBYTES = 32 << 20
MAX_PIXELS = 50_000_000
HEIC_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"heim", b"hevc")
WITHOUT_PILLOW = 'pictures need Pillow: pip install "qchat[vision]"'
# what Pillow's decoders raise for damaged files
DECODING_ERRORS = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, struct.error, zlib.error),
)


THUMBNAIL = 32, 20  # pixels at most


@dataclass(frozen=True)
class Thumbnail:
    """A small picture; `pixels` are its rows of RGB values in hexadecimal, six digits each."""

    width: int
    height: int
    pixels: str


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture file. `name` is what messages call it."""

    data: bytes
    name: str = "the picture"

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the file, which stands for the picture."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright picture, from the file's header. Raises UsageError."""
        with self._reading():
            image = self._open()
            width, height = image.size
            turned = image.getexif().get(ORIENTATION, 1) in TURNED
        return (height, width) if turned else (width, height)

    @cached_property
    def thumbnail(self) -> Thumbnail:
        """The picture within THUMBNAIL pixels. Raises UsageError."""
        small = self._within(*THUMBNAIL, gap=8)
        return Thumbnail(*small.size, small.tobytes().hex())

    def png_within(self, width: int, height: int) -> bytes:
        """Return the upright picture as a PNG file of at most so many pixels. Raises UsageError."""
        return encode_png(self._within(width, height, gap=2))

    def _within(self, width: int, height: int, gap: int) -> "Image":
        """Return the picture made smaller; a JPEG is decoded at `gap` times the size where that is less."""
        self.size  # noqa: B018  refuses what is too large
        with self._reading():
            image = self._open()
            image.draft("RGB", (gap * width, gap * height))
            small = _to_rgb(_upright(image))
            small.thumbnail((width, height))
        return small

    def decode(self) -> "Image":
        """Return the upright picture in RGB. Raises UsageError."""
        self.size  # noqa: B018  refuses what is too large
        with self._reading():
            return _to_rgb(_upright(self._open()))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Make what Pillow raises a UsageError."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            try:
                yield
            except DECODING_ERRORS as error:
                raise self._refuse(error) from error

    def _open(self) -> "Image":
        """Read the header. Raises UsageError, and DECODING_ERRORS."""
        library = import_pillow()
        if len(self.data) > MAX_NBYTES:
            raise UsageError(f"{self.name} has {len(self.data):,} bytes; {MAX_NBYTES:,} are allowed")
        library.init()
        known = [name for name in FORMATS if name in library.OPEN]
        try:
            image = library.open(BytesIO(self.data), formats=known)
        except library.DecompressionBombError as error:
            raise UsageError(f"{self.name} has more than {MAX_PIXELS:,} pixels") from error
        width, height = image.size
        if width * height > MAX_PIXELS or not width * height:
            raise UsageError(
                f"{self.name} has {width:,} x {height:,} pixels; 1 to {MAX_PIXELS:,} in all are allowed"
            )
        return image

    def _refuse(self, error: BaseException) -> UsageError:
        if self.data[4:8] == b"ftyp" and self.data[8:12] in HEIC_BRANDS:
            return UsageError(f"{self.name} is in HEIC, which Pillow cannot read here: save it as JPEG")
        if not self.data:
            return UsageError(f"{self.name} is an empty file")
        if type(error).__name__ == "UnidentifiedImageError":
            return UsageError(f"{self.name} is not a PNG, JPEG, WebP, GIF or AVIF picture")
        return UsageError(f"{self.name} cannot be decoded: {printable(str(error)) or type(error).__name__}")


ORIENTATION = 0x0112  # the tag of EXIF
TURNED = (5, 6, 7, 8)  # orientations that swap width and height


def import_pillow() -> Any:
    """Return the module `PIL.Image`. Raises UsageError where Pillow is missing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(WITHOUT_PILLOW) from error
    return Image


def read_picture_file(path: Path) -> Picture:
    """Read a picture's file. Raises UsageError."""
    try:
        with path.expanduser().open("rb") as file:
            data = file.read(MAX_NBYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return Picture(data, printable(path.name))


def encode_png(image: "Image") -> bytes:
    """Return a picture of Pillow as a PNG file, without loss. Raises UsageError."""
    file = BytesIO()
    try:
        image.save(file, "PNG", compress_level=1)
    except DECODING_ERRORS as error:
        raise UsageError(f"the picture cannot be encoded: {printable(str(error))}") from error
    return file.getvalue()


def _upright(image: "Image") -> "Image":
    from PIL import ImageOps

    image.seek(0)
    return ImageOps.exif_transpose(image)


def _to_rgb(image: "Image") -> "Image":
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip them to 8
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = import_pillow().new("RGB", layer.size, (255, 255, 255))
    white.paste(layer, mask=layer.getchannel("A"))
    return white
