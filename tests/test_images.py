"""Images as users have them: unusual ones look right, unusable ones say why."""

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
