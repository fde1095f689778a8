"""Images as users have them: unusual ones look right, unusable ones say why."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from data_files import encoded, picture
from PIL import Image

from mr1fast.data.images import (
    ANIMATED,
    CMYK,
    DEEP,
    MAX_ASPECT,
    PALETTE,
    ROTATED,
    TRANSPARENT,
    BadImage,
    check_image,
    load_image,
)

RED, BLUE = (200, 30, 30), (20, 40, 220)


def halves(mode="RGB"):
    """40 x 20 pixels, red on the left and blue on the right."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    return image.convert(mode)


def transparent(mode):
    image = halves("RGBA")
    image.paste((0, 0, 0, 0), (20, 0, 40, 20))
    return image.quantize(16) if mode == "P" else image


def sixteen_bits():
    values = np.full((20, 40), 100 * 257, dtype=np.uint16)
    values[:, 20:] = 200 * 257
    return Image.fromarray(values)


def ramp():
    return Image.fromarray(np.linspace(0, 1, 800, dtype=np.float32).reshape(20, 40))


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    return encoded(halves().rotate(90, expand=True), "JPEG", exif=exif, quality=95)


WHITE = (255, 255, 255)
IMAGES = {
    "plain": (encoded(halves()), (RED, BLUE), []),
    "grey": (encoded(halves("L")), None, []),
    "bilevel": (encoded(halves("1")), None, []),
    "jpeg": (encoded(halves(), "JPEG", quality=95), (RED, BLUE), []),
    "cmyk jpeg": (encoded(halves("CMYK"), "JPEG", quality=95), (RED, BLUE), [CMYK]),
    "cmyk tiff": (encoded(halves("CMYK"), "TIFF"), (RED, BLUE), [CMYK]),
    "palette": (encoded(halves("P")), None, [PALETTE]),
    "transparent": (encoded(transparent("RGBA")), (RED, WHITE), [TRANSPARENT]),
    "transparent palette": (encoded(transparent("P")), (RED, WHITE), [PALETTE, TRANSPARENT]),
    "opaque rgba": (encoded(halves("RGBA")), (RED, BLUE), []),
    "16-bit png": (encoded(sixteen_bits()), ((100,) * 3, (200,) * 3), [DEEP]),
    "16-bit tiff": (encoded(sixteen_bits(), "TIFF"), ((100,) * 3, (200,) * 3), [DEEP]),
    "float tiff": (
        encoded(ramp(), "TIFF"),
        None,
        [DEEP],
    ),
    "rotated": (rotated(), (RED, BLUE), [ROTATED]),
    "animated gif": (
        encoded(halves(), "GIF", save_all=True, append_images=[picture(9, (40, 20))]),
        (RED, BLUE),
        [ANIMATED, PALETTE],
    ),
    "animated webp": (
        encoded(halves(), "WEBP", save_all=True, append_images=[picture(9, (40, 20))], lossless=True),
        (RED, BLUE),
        [ANIMATED],
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_unusual_images_look_right(name):
    content, colours, notes = IMAGES[name]
    check_image(content)
    image, said = load_image(content)
    assert (image.mode, image.size) == ("RGB", (40, 20))
    assert said == notes
    if colours is not None:
        for colour, x in zip(colours, (5, 34)):
            assert max(abs(a - b) for a, b in zip(image.getpixel((x, 10)), colour)) <= 12, (
                colour,
                image.getpixel((x, 10)),
            )
    else:
        assert len(set(np.asarray(image).reshape(-1, 3).max(1).tolist())) > 1  # not one flat colour


@pytest.mark.parametrize("bits", [8, 9, 10, 12, 16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF, the other byte order", "PNG in 32 bits"])
def test_images_of_16_bits_are_as_bright_as_the_bits_that_they_hold(bits, kind):
    top = 2**bits - 1
    values = np.linspace(0, top, 800).round().astype(np.uint16).reshape(20, 40)
    if kind == "PNG in 32 bits":
        content = encoded(Image.fromarray(values.astype(np.int32)), "TIFF")
    elif kind == "TIFF, the other byte order":
        content = encoded(Image.frombytes("I;16B", (40, 20), values.astype(">u2").tobytes()), "TIFF")
    else:
        content = encoded(Image.fromarray(values), kind)
    check_image(content)
    image, notes = load_image(content)
    assert notes == [DEEP]
    scale = {9: 2**10 - 1}.get(bits, top)
    np.testing.assert_allclose(np.asarray(image)[..., 0], values * (255.0 / scale), atol=0.51)


def png_of_16_bits(values):
    """[height, width, channels] uint16, which Pillow reads but does not write."""
    height, width, channels = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return content


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colour_images_of_16_bits_are_read_or_left_out_but_never_black(channels):
    values = np.full((20, 40, channels), 2**16 - 1, np.uint16)  # opaque
    colours = slice(0, 1 if channels == 2 else 3)
    values[..., colours] = 100 * 257
    assert load_image(png_of_16_bits(values))[0].getpixel((0, 0)) == (100, 100, 100)
    for bits in (8, 10, 12):
        values[..., colours] = 2**bits - 1
        with pytest.raises(BadImage, match="colour image of 16 bits a channel holds 12 or fewer"):
            load_image(png_of_16_bits(values))


def bomb():
    """A PNG whose header promises 100 000 x 100 000 pixels."""
    content = bytearray(encoded(picture()))
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


UNUSABLE = {
    "image file is empty": b"",
    "image cannot be read": b"GIF89a nothing of the kind",
    "image has more than 89 million pixels": bomb(),
    f"image is more than {MAX_ASPECT} times longer than wide": encoded(Image.new("RGB", (2 * MAX_ASPECT + 1, 2))),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_unusable_images_say_why(reason):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match=reason):
            check_image(UNUSABLE[reason])


def test_no_damage_to_a_file_raises_anything_else():
    rng = np.random.default_rng(0)
    refused = 0
    for content, _, _ in IMAGES.values():
        for _ in range(25):
            broken = bytearray(content)
            for position in rng.integers(0, len(content), 6):
                broken[position] = rng.integers(0, 256)
            try:
                load_image(bytes(broken[: rng.integers(1, len(content) + 1)]))
            except BadImage:
                refused += 1
    assert refused > 100
