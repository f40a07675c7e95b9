"""Decode any photo into upright 8-bit RGB by fixed rules, or give the reason why it cannot be decoded.

`decode_image` follows one rule per kind of image:

| kind | rule |
|---|---|
| EXIF orientation | turned upright before anything else; an unreadable EXIF block counts as none |
| grey, black and white | the value is repeated in R, G and B |
| 16-bit grey | divided by 257 and rounded, so that 65535 becomes 255 (a plain `convert` would clip at 255) |
| 16-bit RGB(A) PNG | Pillow keeps the high byte |
| palette | each pixel gets its color from the palette |
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
from PIL import ExifTags, Image, ImageFile, ImageOps

# The formats that cameras, browsers and data sets use. Each further decoder (PSD, ICO, EPS, FITS …) is code that reads
# untrusted bytes, and some decoders start other programs. Images in other formats are quarantined by the format's name.
ALLOWED_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
try:  # HEIF is the format of phones. Its decoder is a separate package.
    from pillow_heif import register_heif_opener

    register_heif_opener()
    ALLOWED_FORMATS += ("HEIF",)
    HEIF_FIX = ""
except ImportError:
    HEIF_FIX = "run pip install pillow-heif, or export the photos as JPEG"
# Pixels per image, read from the header before decoding. A 64-megapixel phone photo (9248 x 6936) is still allowed.
MAX_PIXELS = 2**26
MAX_BYTES = 2**28  # Bytes per file. The limit keeps a misnamed archive or video out of memory.
MIN_SIDE = 8  # px. A smaller image is a tracking pixel or an icon, and upscaling it teaches blur.
# The hash of every cache contains this version. Change it with any rule of this module.
TRANSFORM_VERSION = "1: rgb over white, center square, lanczos"

ImageFile.LOAD_TRUNCATED_IMAGES = False  # A truncated photo, grey in part, must be quarantined instead of trained on.
# MAX_PIXELS is checked below, and is lower than the size at which Pillow would start to warn.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_EXIF_MARKS = (b"Exif", b"eXIf", b"EXIF", b"II*\0", b"MM\0*")  # Bytes of JPEG and HEIF, PNG, WebP, and TIFF with EXIF.
LFS_POINTER = b"version https://git-lfs"
_SIGNATURES = (  # (offset, bytes, name): names the format of a file without running its decoder.
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
    """Exception for an image that cannot be used.

    The exception's `reason` is a readable text: `kind` or `kind: detail`.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason

    @property
    def kind(self) -> str:
        """Return the kind of a reason, its part before the colon, by which bad images are counted."""
        return self.reason.split(":")[0]


def read_image_file(path: str | Path) -> bytes:
    """Return the bytes of an image file.

    Raises:
        BadImage: the file is missing, unreadable, not a regular file, or larger than MAX_BYTES.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # Reading a pipe would wait for ever.
            raise BadImage("unreadable: not a regular file")
        if status.st_size > MAX_BYTES:
            raise BadImage(f"too large: {status.st_size / 2**20:.0f} MiB, the limit is {MAX_BYTES / 2**20:.0f} MiB")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        dangling = os.path.islink(path)
        raise BadImage("missing file: the link points to nothing" if dangling else "missing file") from None
    except (OSError, ValueError) as error:  # A zero byte in the path raises ValueError.
        raise BadImage(f"unreadable: {getattr(error, 'strerror', None) or error}") from None


def decode_image(source: bytes | str | Path, draft_side: int | None = None) -> Image.Image:
    """Decode an image file to an upright 8-bit RGB image, by the rules in this module's docstring.

    Args:
        source: the bytes of the image file, or its path.
        draft_side: size (px) to which the caller will shrink the shorter side. With `draft_side`, a JPEG may be decoded
            at 1/2, 1/4 or 1/8 of its size, which is faster. The sides of the decoded image stay at least twice
            `draft_side`.

    Raises:
        BadImage: the image file is empty, unreadable, truncated, damaged, or not an image. `BadImage` is also raised if
            the format is not in ALLOWED_FORMATS, the image has more than MAX_PIXELS, or a side is below MIN_SIDE.
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
                image.draft(None, (2 * draft_side, 2 * draft_side))  # Only the JPEG decoder obeys this.
            image.load()
            return _to_rgb(_upright(image))
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(_describe(data)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"too many pixels: the limit is {MAX_PIXELS / 1e6:.0f} megapixels") from None
    except Exception as error:  # Decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError …
        detail = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(f"{'truncated' if 'truncated' in detail.lower() else 'damaged'}: {detail}") from None


CROPS_VERSION = "1: 80 to 100 % of the shorter side"  # The hash of every cache with random crops contains this version.
LEAST_CROP = 0.8  # Smallest side of a random crop, as a share of the image's shorter side.


def random_crop(image: Image.Image, resolution: int, seed: list[int]) -> np.ndarray:
    """Return a random square of an RGB image, scaled as `fit` scales: uint8 [resolution, resolution, 3].

    Size and place of the square are functions of the seed and of the image's size. Of a JPEG that was decoded at a part of
    its size (`decode_image`), the square has at least 1.6 times the resolution.
    """
    width, height = image.size
    share, x, y = np.random.default_rng(seed).uniform((LEAST_CROP, 0, 0), 1)
    side = share * min(width, height)
    left, top = x * (width - side), y * (height - side)
    box = (left, top, left + side, top + side)
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return np.asarray(square, dtype=np.uint8)


def fit(image: Image.Image, resolution: int) -> np.ndarray:
    """Return the center square of an RGB image, scaled to uint8 [resolution, resolution, 3], 0 to 255.

    The resized image is as if the shorter side were scaled to `resolution` (antialiased Lanczos) and the center
    cropped. The image is cropped before it is scaled, because an image of 8 x 8,000,000 px would become one of 128 x
    128,000,000 px.
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
    except Exception:  # A broken EXIF block does not make the pixels bad.
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
    """Return whether the first bytes of a file are those of an allowed image format.

    For an unreadable file, the result is False.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # Opening a pipe would wait for ever.
            return False
        with open(path, "rb") as file:
            name = _format_of(file.read(64))
            return ("HEIF" if name == "HEIC" else name) in ALLOWED_FORMATS
    except (OSError, ValueError):
        return False


def _format_of(head: bytes) -> str | None:
    return next((name for offset, magic, name in _SIGNATURES if head[offset : offset + len(magic)] == magic), None)


def _describe(data: bytes) -> str:
    """Return the reason why Pillow does not recognize the bytes of an image, without running another decoder."""
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


# Image cells of a data set: each holds the bytes of the image file, or its path


def image_bytes(image: dict[str, Any] | None, roots: tuple[Path, ...]) -> bytes:
    """Return the bytes of the image file in an undecoded image cell.

    Args:
        image: an image cell of a data set, with the keys `bytes` and `path`, or None.
        roots: folders below which the path in the image cell must lie. A relative path in the cell starts at the first
            of the folders.

    Raises:
        BadImage: the image cell is empty, or its file is outside the folders or cannot be read.
    """
    if image is None or (image["bytes"] is None and not image["path"]):
        raise BadImage("missing image")
    if image["bytes"] is not None:
        return image["bytes"]
    path = Path(
        os.path.abspath(roots[0] / image["path"])
    )  # Removes "..", but keeps links, of which the Hub's cache consists.
    if not any(path.is_relative_to(os.path.abspath(root)) for root in roots):
        raise BadImage("outside the dataset folder")
    return read_image_file(path)


def has_gps(data: bytes) -> bool:
    """Return whether the bytes of an image file say where the photo was taken: its EXIF block has a directory for GPS."""
    if not any(mark in data for mark in _EXIF_MARKS):  # The usual case, without Pillow.
        return False
    try:
        with Image.open(io.BytesIO(data), formats=ALLOWED_FORMATS) as image:
            return bool(image.getexif().get_ifd(ExifTags.IFD.GPSInfo))
    except Exception:  # Decoders raise a dozen types, and a broken EXIF block does not make the pixels bad.
        return False


def image_digest(image: dict[str, Any] | None, roots: tuple[Path, ...]) -> bytes:
    """Return the SHA-256 of an image file, or of the file's path if the file cannot be read."""
    try:
        return hashlib.sha256(image_bytes(image, roots)).digest()
    except BadImage as error:
        return hashlib.sha256(f"{error.reason} {image and image['path']}".encode()).digest()
