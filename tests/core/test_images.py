"""Pictures of any kind become the pixels a VAE encodes; what is none says why in one line."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from hgdpo_core.errors import InputError
from hgdpo_core.images import decode_image, fit_image, to_model_range
from hgdpo_core.images.colours import to_srgb


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(data: bytes) -> tuple[int, ...]:
    image = decode_image(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def halves(width: int, height: int) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 0, 255), (width // 2, 0, width, height))
    return image


def test_every_mode_becomes_its_colours():
    orange = (200, 100, 10)
    assert colour(saved(Image.new("RGB", (4, 4), orange))) == orange
    assert colour(saved(Image.new("RGBA", (4, 4), (*orange, 255)))) == orange
    assert colour(saved(Image.new("RGBA", (4, 4), (*orange, 128)))) == pytest.approx((227, 177, 132), abs=1)
    assert colour(saved(Image.new("RGBA", (4, 4), (*orange, 0)))) == (255, 255, 255)
    assert colour(saved(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert colour(saved(Image.new("LA", (4, 4), (77, 0)))) == (255, 255, 255)
    assert colour(saved(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert colour(saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=100)) == (255, 0, 0)
    palette = Image.new("RGB", (4, 4), orange).quantize(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colour(saved(palette)) == orange
        assert colour(saved(palette, transparency=b"\x00" * 4)) == (255, 255, 255)
        assert colour(saved(palette, "GIF")) == orange


def test_sixteen_bits_are_scaled_and_not_cut():
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(np.asarray(decode_image(saved(ramp, kind)))[..., 0].ravel(), np.arange(256))
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)  # a PNG of 16 bits a colour, which Pillow cannot write
    row = zlib.compress(b"\0" + struct.pack(">HHH", 65535, 0x8000, 0))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", row), (b"IEND", b"")))
    assert colour(png) == (255, 128, 0)


@pytest.mark.parametrize("image", [Image.new("F", (4, 4), 0.5), Image.new("I", (4, 4), 70_000)])
def test_pixels_without_a_known_white_are_refused(image):
    with pytest.raises(InputError, match="32 bits, whose white is not stated: save it with 8 or 16 bits"):
        decode_image(saved(image, "TIFF"))


@pytest.mark.parametrize(("orientation", "left"), [(1, (254, 0, 0)), (2, (0, 0, 254)), (3, (0, 0, 254))])
def test_images_are_rotated_by_their_exif(orientation, left):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(saved(halves(64, 32), "JPEG", quality=95, exif=exif))
    assert image.size == (64, 32) and image.getpixel((8, 16)) == pytest.approx(left, abs=3)


@pytest.mark.parametrize(("orientation", "top"), [(6, (254, 0, 0)), (8, (0, 0, 254))])
def test_images_on_their_side_are_rotated_upright(orientation, top):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(saved(halves(64, 32), "JPEG", quality=95, exif=exif))
    assert image.size == (32, 64) and image.getpixel((16, 8)) == pytest.approx(top, abs=3)


@pytest.mark.parametrize("size", [(704, 1024), (1024, 704), (705, 1025), (353, 513), (3000, 701), (640, 5000),
                                  (997, 991)])
def test_an_image_covers_the_size_and_keeps_its_aspect(size):
    """A centred circle of the source is a centred circle of the result, scaled by what makes the image cover."""
    width, height = 88, 128
    radius = 0.2 * min(size)
    x, y = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    circle = np.hypot(x - size[0] / 2, y - size[1] / 2) < radius
    fitted = fit_image(Image.fromarray(np.where(circle, 255, 0).astype(np.uint8)).convert("RGB"), width, height)
    assert fitted.size == (width, height)
    inside = np.asarray(fitted)[..., 0].astype(float) / 255
    scale = max(width / size[0], height / size[1])
    for axis, middle in ((0, width / 2), (1, height / 2)):
        profile = inside.sum(axis=axis)
        centre = (profile * (np.arange(len(profile)) + 0.5)).sum() / profile.sum()
        assert centre == pytest.approx(middle, abs=0.5)
    # seen from the middle the circle is equally wide and high: nothing was stretched
    row, column = inside[height // 2], inside[:, width // 2]
    expected = 2 * radius * scale
    assert row.sum() == pytest.approx(min(expected, width), abs=1.5)
    assert column.sum() == pytest.approx(min(expected, height), abs=1.5)


def test_pixels_reach_from_minus_one_to_one():
    pixels = to_model_range(halves(4, 2))
    assert pixels.shape == (3, 2, 4) and pixels.dtype == np.float32
    assert pixels[:, 0, 0].tolist() == [1, -1, -1] and pixels[:, 1, 3].tolist() == [-1, -1, 1]


def test_a_decompression_bomb_is_refused_unopened():
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
                      for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000)))))
    with pytest.raises(InputError, match="exceeds limit of 178956970 pixels"):
        decode_image(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.filterwarnings("ignore::UserWarning")  # by which Pillow comments on broken files
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_broken_bytes_are_one_line_whatever_is_broken(kind):
    """Cut off or with wrong bytes in it, a file is refused in our own words or still an image: nothing else."""
    rng = np.random.default_rng(0)
    whole = saved(Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)), kind)
    refused = 0
    for trial in range(120):
        data = bytearray(whole[:rng.integers(len(whole))] if trial % 3 == 0 else whole)
        for location in rng.integers(0, max(1, min(len(data), 200)), 3 if data and trial % 3 else 0):
            data[location] = rng.integers(256)
        try:
            assert decode_image(bytes(data)).mode == "RGB"
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and "object at" not in str(error)
    assert refused >= 20


def profile(red, green, blue) -> bytes:
    """A matrix profile of these primaries (XYZ under D50) and gamma 2.2."""
    def fixed(values) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"made\0" + bytes(78)
    white = (0.9642, 1, 0.8249)
    tags = {b"desc": text, b"wtpt": fixed(white), b"rXYZ": fixed(red), b"gXYZ": fixed(green), b"bXYZ": fixed(blue),
            b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, b"cprt": b"text\0\0\0\0none\0"}
    at, table, data = 132 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", at + len(data), len(value))
        data += value
    body = struct.pack(">I", len(tags)) + table + data
    start = struct.pack(">IIi", 128 + len(body), 0, 0x02100000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    return start + fixed(white)[8:] + bytes(48) + body


WIDE = profile((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("shown", [(224, 172, 150), (200, 30, 40), (40, 180, 70)])
def test_an_embedded_profile_is_turned_into_srgb_once(kind, shown):
    """Display P3, as phones write it."""
    options = {"quality": 100} if kind in ("JPEG", "WEBP") else {}
    srgb, wide = ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(WIDE))
    stored = ImageCms.profileToProfile(Image.new("RGB", (32, 32), shown), srgb, wide)
    image = decode_image(saved(stored, kind, icc_profile=WIDE, **options))
    assert image.getpixel((5, 5)) == pytest.approx(shown, abs=4)
    assert to_srgb(image).getpixel((5, 5)) == image.getpixel((5, 5))
    cut_out = stored.copy()
    cut_out.putalpha(0)
    assert colour(saved(cut_out, "PNG", icc_profile=WIDE)) == (255, 255, 255)


def test_a_profile_of_srgb_or_a_broken_one_changes_no_pixel():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (srgb, b"no profile", WIDE[:200]):
        assert colour(saved(Image.new("RGB", (4, 4), (200, 100, 10)), icc_profile=icc)) == (200, 100, 10)
    assert colour(saved(Image.new("L", (4, 4), 77), icc_profile=WIDE)) == (77, 77, 77)


def test_postscript_is_refused_and_starts_no_interpreter():
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(InputError, match="do not decode as an image: expected PNG, JPEG"):
        decode_image(page)
