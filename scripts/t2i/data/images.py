"""Decode any photo into upright 8-bit RGB by fixed rules, and say why not where that cannot be done.

One rule for each kind of image (`decode_image`):

| kind | rule |
|---|---|
| EXIF orientation | turned upright before anything else; an unreadable EXIF block counts as none |
| grey, black and white | the value is repeated in R, G and B |
| 16-bit grey | divided by 257 and rounded, so that 65535 becomes 255 (a plain `convert` would clip at 255) |
| 16-bit RGB(A) PNG | Pillow keeps the high byte |
| palette | its colors |
| transparency (RGBA, LA, palette or key color) | composited over white |
| CMYK, YCbCr | Pillow's conversion, which also undoes Adobe's inverted CMYK; color profiles are not applied |
| animated, several pages | the first frame |
| 32-bit integer beyond 16 bits, float | refused: their range is not known |
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

# The formats that cameras, browsers and data sets use. Each further decoder is code that reads untrusted bytes
# (PSD, ICO, EPS, FITS …), and some of them start other programs: what is not here is quarantined by name.
ALLOWED_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
try:  # the format of phones; its decoder is a package of its own
    from pillow_heif import register_heif_opener

    register_heif_opener()
    ALLOWED_FORMATS += ("HEIF",)
    HEIF_FIX = ""
except ImportError:
    HEIF_FIX = "run pip install pillow-heif, or export the photos as JPEG"
MAX_PIXELS = 2**26  # px, read from the header before decoding; a 64-megapixel phone photo (9248 x 6936) is still in
MAX_BYTES = 2**28  # bytes of one file; keeps a mistaken archive or video out of memory
MIN_SIDE = 8  # px; below that it is a tracking pixel or an icon, and upscaling it teaches blur
TRANSFORM_VERSION = "1: rgb over white, center square, lanczos"  # in every cache's hash: change it with any rule here

ImageFile.LOAD_TRUNCATED_IMAGES = False  # a half-grey photo must be quarantined, not trained on
# MAX_PIXELS is checked below, and is lower than the size at which Pillow would start to warn.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

LFS_POINTER = b"version https://git-lfs"
_SIGNATURES = (  # (offset, bytes, name), to name what a file is without running its decoder
    (0, b"\xff\xd8\xff", "JPEG"), (0, b"\x89PNG", "PNG"), (8, b"WEBP", "WEBP"), (0, b"GIF8", "GIF"), (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (0, b"8BPS", "PSD"), (0, b"\0\0\1\0", "ICO"),
    (0, b"%PDF", "PDF"), (0, b"%!PS", "EPS"), (4, b"ftypavif", "AVIF"), (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"), (4, b"ftypmif1", "HEIF"), (4, b"ftypmsf1", "HEIF"), (4, b"ftyp", "MP4 or MOV"),
    (0, b"\0\0\0\x0cjP", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"), (0, b"\0\0\0\x0cJXL", "JPEG XL"), (0, b"DDS ", "DDS"), (0, b"qoif", "QOI"),
    (0, b"PK\x03\x04", "ZIP"), (0, b"\x1f\x8b", "gzip"), (0, b"icns", "ICNS"), (0, b"II+\0", "BigTIFF"),
    (0, b"P4\n", "PBM"), (0, b"P5\n", "PGM"), (0, b"P6\n", "PPM"), (0, b"\x01\xda", "SGI"), (0, b"FORM", "IFF"),
)  # fmt: skip


class BadImage(Exception):
    """An image that cannot be used. `reason` is `kind` or `kind: detail`, in words for a person."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason

    @property
    def kind(self) -> str:
        """The part of the reason that many images share, for counting."""
        return self.reason.split(":")[0]


def read_image_file(path: str | Path) -> bytes:
    """The bytes of a file. Raises BadImage where it is missing, unreadable, no regular file, or over MAX_BYTES."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise BadImage("unreadable: not a regular file")
        if status.st_size > MAX_BYTES:
            raise BadImage(f"too large: {status.st_size / 2**20:.0f} MiB, the limit is {MAX_BYTES / 2**20:.0f} MiB")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        dangling = os.path.islink(path)
        raise BadImage("missing file: the link points to nothing" if dangling else "missing file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise BadImage(f"unreadable: {getattr(error, 'strerror', None) or error}") from None


def decode_image(source: bytes | str | Path, draft_side: int | None = None) -> Image.Image:
    """Decode to an upright 8-bit RGB image, by the rules of this module's docstring.

    `source`: the file's bytes, or its path. `draft_side` (px): the caller will shrink the shorter side to this; a JPEG
    may then be decoded at 1/2, 1/4 or 1/8 of its size, never below twice `draft_side`, which is several times faster.

    Raises BadImage with the reason: empty, truncated or damaged, not an image, a format outside ALLOWED_FORMATS,
    more than MAX_PIXELS, a side below MIN_SIDE, or unreadable.
    """
    data = source if isinstance(source, bytes) else read_image_file(source)
    if not data:
        raise BadImage("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=ALLOWED_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"too many pixels: {width} x {height}, the limit is {MAX_PIXELS / 1e6:.0f} megapixels")
            if min(width, height) < MIN_SIDE:
                raise BadImage(f"too small: {width} x {height} px, the limit is {MIN_SIDE} px a side")
            if draft_side is not None:
                image.draft(None, (2 * draft_side, 2 * draft_side))  # does nothing but for JPEG
            image.load()
            return _to_rgb(_upright(image))
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(_describe(data)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"too many pixels: the limit is {MAX_PIXELS / 1e6:.0f} megapixels") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError …
        detail = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(f"{'truncated' if 'truncated' in detail.lower() else 'damaged'}: {detail}") from None


def fit(image: Image.Image, resolution: int) -> np.ndarray:
    """Return the centre square of an RGB image, as uint8 [resolution, resolution, 3], 0 to 255.

    The result is that of scaling the shorter side to `resolution` (antialiased Lanczos) and cropping the centre.
    The crop comes first, so that an image of 8 x 8,000,000 px never becomes one of 128 x 128,000,000.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return np.asarray(square, dtype=np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        if image.mode == "F":
            raise BadImage("pixels without a known range: 32-bit float")
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("pixels without a known range: 32-bit integer")
        grey = ((values + 128) // 257).astype(np.uint8)  # round(v / 257): 65535 = 255 * 257
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def starts_like_an_image(path: str | Path) -> bool:
    """Whether a file's first bytes are those of a format that is decoded here; False if it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            return False
        with open(path, "rb") as file:
            name = _format_of(file.read(64))
            return ("HEIF" if name == "HEIC" else name) in ALLOWED_FORMATS
    except (OSError, ValueError):
        return False


def _format_of(head: bytes) -> str | None:
    return next((name for offset, magic, name in _SIGNATURES if head[offset : offset + len(magic)] == magic), None)


def _describe(data: bytes) -> str:
    """Why Pillow did not know these bytes, without running any further decoder."""
    if data.startswith(LFS_POINTER):
        return "Git LFS pointer: run git lfs pull"
    name = _format_of(data[:64])
    if name in ("HEIC", "HEIF") and HEIF_FIX:
        return f"HEIC of a phone is not read here, {HEIF_FIX}"
    if name in ALLOWED_FORMATS or name in ("HEIC", "HEIF"):
        return f"damaged: the {name} header cannot be read"
    if name:
        return f"format not allowed: {name}"
    text = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith((b"<svg", b"<?xml")) and b"<svg" in data[:4096]:
        return "format not allowed: SVG"
    if not any(data[:1024]):
        return "not an image: starts with zeros"
    shown = text[:24].decode("ascii", "backslashreplace").split("\n")[0].strip()
    return f"not an image: starts with '{shown}'"


# Image cells of a data set: the file's bytes, or its path


def image_bytes(image: dict[str, Any] | None, roots: tuple[Path, ...]) -> bytes:
    """The file's bytes of an undecoded image cell; raises BadImage."""
    if image is None or (image["bytes"] is None and not image["path"]):
        raise BadImage("missing image")
    if image["bytes"] is not None:
        return image["bytes"]
    path = Path(os.path.abspath(roots[0] / image["path"]))  # folds "..", keeps links: the Hub's cache is made of them
    if not any(path.is_relative_to(os.path.abspath(root)) for root in roots):
        raise BadImage("outside the dataset folder")
    return read_image_file(path)


def image_digest(image: dict[str, Any] | None, roots: tuple[Path, ...]) -> bytes:
    """SHA-256 of the image file; of its path where it cannot be read."""
    try:
        return hashlib.sha256(image_bytes(image, roots)).digest()
    except BadImage as error:
        return hashlib.sha256(f"{error.reason} {image and image['path']}".encode()).digest()
