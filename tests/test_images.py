"""Every kind of image becomes upright RGB by one rule; every kind of damage is named and refused."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from t2i.data.images import HEIF_FIX, MAX_PIXELS, BadImage, decode_image, fit


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def color_of(data: bytes) -> tuple[int, int, int]:
    image = decode_image(data)
    assert image.mode == "RGB"
    colors = np.unique(np.asarray(image).reshape(-1, 3), axis=0)
    assert len(colors) == 1
    return tuple(int(value) for value in colors[0])


def png(width: int, height: int, bits: int, kind: int, rows: bytes) -> bytes:
    """A PNG written by hand: Pillow itself writes neither 16-bit RGB nor a header without pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def photo(width: int = 64, height: int = 48) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 3 % 256, y * 5 % 256, (x + y) % 256], -1).astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"])
def test_every_allowed_format_decodes(kind):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    image = Image.new("RGB", (16, 12), (200, 40, 90))
    assert np.abs(np.array(color_of(encoded(image, kind, **options))) - [200, 40, 90]).max() <= (
        2 if kind == "JPEG" else 0
    )


def test_grey_is_repeated_and_bilevel_is_black_and_white():
    assert color_of(encoded(Image.new("L", (9, 9), 77))) == (77, 77, 77)
    assert color_of(encoded(Image.new("1", (9, 9), 1))) == (255, 255, 255)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (128, 0), (129, 1), (257, 1), (32768, 128), (65535, 255)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(value, expected, kind):
    image = Image.fromarray(np.full((8, 8), value, np.uint16))
    assert color_of(encoded(image, kind)) == (expected,) * 3


def test_big_endian_16_bit_tiff_and_32_bit():
    big = encoded(Image.frombytes("I;16B", (8, 8), struct.pack(">H", 51400) * 64), "TIFF")
    assert color_of(big) == (200, 200, 200)
    assert color_of(encoded(Image.fromarray(np.full((8, 8), 51400, np.int32)), "TIFF")) == (200, 200, 200)
    with pytest.raises(BadImage, match="known range"):
        decode_image(encoded(Image.fromarray(np.full((8, 8), 70000, np.int32)), "TIFF"))
    with pytest.raises(BadImage, match="known range"):
        decode_image(encoded(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"))


def test_16_bit_color_png_keeps_the_high_byte():
    row = b"\0" + struct.pack(">HHH", 0x12FF, 0x80AB, 0xFFFF) * 8
    assert color_of(png(8, 8, 16, 2, row * 8)) == (0x12, 0x80, 0xFF)


def test_transparency_goes_over_white():
    assert color_of(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))) == (255, 255, 255)
    assert color_of(encoded(Image.new("RGBA", (8, 8), (200, 100, 0, 51)))) == (244, 224, 204)  # 255 + 0.2 (c - 255)
    assert color_of(encoded(Image.new("LA", (8, 8), (55, 51)))) == (215, 215, 215)
    assert color_of(encoded(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)


def test_palette_gives_its_colors_and_its_transparency():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert color_of(encoded(palette)) == (10, 20, 30)
    assert color_of(encoded(palette, transparency=1)) == (255, 255, 255)
    assert color_of(encoded(palette, "GIF", transparency=1)) == (255, 255, 255)


def test_cmyk_is_converted_also_when_adobe_inverted_it():
    assert color_of(encoded(Image.new("CMYK", (8, 8), (0, 255, 0, 0)), "TIFF")) == (255, 0, 255)
    # Pillow writes CMYK JPEGs inverted, with the Adobe marker that says so.
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    assert np.abs(np.array(color_of(data)) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation, kind):
    upright = Image.new("RGB", (32, 16), "white")
    ImageDraw.Draw(upright).rectangle((0, 0, 15, 7), fill="red")  # top left
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that makes the stored pixels
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encoded(stored, kind, exif=exif, **({"quality": 100} if kind != "TIFF" else {})))
    assert image.size == (32, 16)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() < 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_is_no_damage():
    data = encoded(Image.new("RGB", (16, 16), (9, 9, 9)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    assert decode_image(data).size == (16, 16)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animated_gives_the_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), color) for color in ((250, 0, 0), (0, 250, 0))]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    assert color_of(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)) == (250, 0, 0)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
DAMAGED = {
    "empty": (b"", "empty file"),
    "html": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "not an image: starts with '<!DOCTYPE html>'"),
    "json": (b'{"error": "rate limit"}', "not an image: starts with"),
    "zeros": (bytes(5000), "not an image: starts with zeros"),
    "random": (b"\x13\x37" + bytes(range(200)), "not an image"),
    "truncated JPEG": (encoded(NOISE, "JPEG")[:2000], "truncated"),
    "truncated PNG": (encoded(NOISE)[:3000], "truncated|damaged"),
    "truncated BMP": (encoded(NOISE, "BMP")[:3000], "truncated"),
    "truncated GIF": (encoded(NOISE, "GIF")[:2000], "truncated|damaged"),
    "truncated WEBP": (encoded(NOISE, "WEBP")[:800], "truncated|damaged"),
    "truncated TIFF": (encoded(NOISE, "TIFF")[:1000], "truncated|damaged"),
    "JPEG header alone": (encoded(NOISE, "JPEG")[:20], "truncated|damaged"),
    "PNG signature alone": (b"\x89PNG\r\n\x1a\n", "damaged"),
    "PNG with a wrong checksum": (encoded(NOISE).replace(b"IDAT", b"IDAt", 1), "damaged|truncated"),
    "bomb": (png(30_000, 30_000, 8, 2, b""), "too many pixels"),
    "bomb below Pillow's own limit": (png(2**14, 2**12 + 1, 8, 0, b""), "too many pixels: 16384 x 4097"),
    "small": (encoded(Image.new("RGB", (1, 1))), "too small: 1 x 1 px"),
    "ICO": (encoded(Image.new("RGB", (32, 32)), "ICO"), "format not allowed: ICO"),
    "PSD": (b"8BPS\0\x01" + bytes(40), "format not allowed: PSD"),
    "SVG": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "format not allowed: SVG"),
    "PDF": (encoded(Image.new("RGB", (32, 32)), "PDF"), "format not allowed: PDF"),
    "EPS": (encoded(Image.new("RGB", (32, 32)), "EPS"), "format not allowed: EPS"),
    "PPM": (encoded(Image.new("RGB", (32, 32)), "PPM"), "format not allowed: PPM"),
    "TGA": (encoded(Image.new("RGB", (32, 32)), "TGA"), "not an image"),
    "HEIC": (
        b"\0\0\0\x18ftypheic" + bytes(40),
        r"HEIC of a phone is not read here, run pip install pillow-heif, or export the photos as JPEG",
    ),
    "ZIP": (b"PK\x03\x04" + bytes(40), "format not allowed: ZIP"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name, tmp_path):
    data, reason = DAMAGED[name]
    with pytest.raises(BadImage, match=reason):
        decode_image(data)
    (tmp_path / "photo.jpg").write_bytes(data)
    with pytest.raises(BadImage, match=reason):
        decode_image(tmp_path / "photo.jpg", draft_side=16)


def test_a_large_allowed_size_is_not_a_bomb():
    assert MAX_PIXELS >= 9248 * 6936  # a 64-megapixel phone
    with pytest.raises(BadImage, match=r"truncated|damaged"):  # past the size check, which reads only the header
        decode_image(png(2**13, 2**13, 8, 0, b""))


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in {
        "gone.jpg": "missing file$",
        "link.jpg": "link points to nothing",
        "pipe.jpg": "not a regular file",
        ".": "not a regular file",
        "a\0b.jpg": "unreadable",
    }.items():
        with pytest.raises(BadImage, match=reason):
            decode_image(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads files without permission")
def test_a_file_without_permission_is_named(tmp_path):
    (tmp_path / "photo.png").write_bytes(encoded(photo()))
    (tmp_path / "photo.png").chmod(0)
    with pytest.raises(BadImage, match="Permission denied"):
        decode_image(tmp_path / "photo.png")


def test_truncation_at_any_byte_never_gives_a_picture_with_missing_rows():
    data = encoded(NOISE, "JPEG", quality=90)
    for end in range(0, len(data) - 400, 97):
        with pytest.raises(BadImage):
            decode_image(data[:end])


def test_fit_takes_the_centre_square_and_antialiases():
    wide = np.asarray(photo(120, 40))
    fitted = fit(Image.fromarray(wide), 20)
    assert fitted.shape == (20, 20, 3)
    assert fitted.dtype == np.uint8
    scaled = Image.fromarray(wide).resize((60, 20), Image.Resampling.LANCZOS).crop((20, 0, 40, 20))
    assert np.abs(fitted.astype(int) - np.asarray(scaled)).max() <= 1
    tall = fit(Image.fromarray(wide.transpose(1, 0, 2).copy()), 20)
    assert np.abs(tall.astype(int) - fitted.transpose(1, 0, 2)).max() <= 1
    checker = np.indices((256, 256)).sum(0) % 2 * 255
    grey = fit(Image.fromarray(checker.astype(np.uint8)).convert("RGB"), 16)
    assert np.abs(grey.astype(int) - 128).max() <= 4  # nearest neighbour would give 0 or 255


def test_fit_at_the_image_s_own_size_changes_nothing_and_enlarges_small_ones():
    image = photo(48, 48)
    assert (fit(image, 48) == np.asarray(image)).all()
    assert fit(Image.new("RGB", (8, 9), (5, 6, 7)), 64).reshape(-1, 3).tolist() == [[5, 6, 7]] * 64 * 64


def test_an_extreme_shape_stays_cheap():
    assert fit(Image.new("RGB", (8, 1_000_000)), 128).shape == (128, 128, 3)


def test_the_fast_jpeg_path_differs_little():
    shapes = Image.new("RGB", (1200, 900), (40, 90, 40))
    for index in range(12):
        box = (index * 90, index * 60, index * 90 + 250, index * 60 + 200)
        ImageDraw.Draw(shapes).ellipse(box, fill=(20 * index, 250 - 15 * index, 90), outline="white")
    data = encoded(shapes, "JPEG", quality=95)
    fast, exact = decode_image(data, draft_side=64), decode_image(data)
    assert exact.size == (1200, 900)
    assert fast.size[1] < 900
    assert min(fast.size) >= 128
    assert np.abs(fit(fast, 64).astype(int) - fit(exact, 64)).mean() < 1.5


@pytest.mark.skipif(bool(HEIF_FIX), reason="pillow-heif is not installed")
def test_heic_is_read_where_its_decoder_is_installed():
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(file, "HEIF", quality=90)
    assert decode_image(file.getvalue()).size == (32, 32)
