"""Any image file as an upright 8-bit RGB image, or a short reason why it cannot be one."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Pillow warns above this and refuses above twice this: a file of kilobytes may unpack to gigabytes.
MAX_PIXELS = 89_478_485
# Pillow has Ghostscript run the program that an EPS file is, and an IPTC file may hold one.
PROGRAMS = ("EPS", "IPTC")
# Qwen2-VL's image processor refuses longer ones.
MAX_ASPECT = 200
_ORIENTATION = 0x0112  # EXIF tag

ROTATED = "EXIF-rotated image turned upright"
ANIMATED = "first frame of an animated image taken"
TRANSPARENT = "transparent image put on white"
PALETTE = "palette image converted to RGB"
CMYK = "CMYK image converted to RGB"
DEEP = "image of more than 8 bits a channel scaled to 8"
# Of 16 bits per colour Pillow keeps the upper 8, in which an image that uses 12 bits or fewer is black.
HELD_TOO_LITTLE = "colour image of 16 bits a channel holds 12 or fewer"


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason, short enough to be counted."""


def check_image(source: Path | bytes) -> int:
    """The number of pixels, after a look at the header and the checksums, without decoding. Raises BadImage."""
    with _opened(source) as image:
        image.verify()
        return image.width * image.height


def load_image(source: Path | bytes) -> tuple[Image.Image, list[str]]:
    """The decoded image in mode RGB, upright, and a note for each repair that this took. Raises BadImage."""
    with _opened(source) as image:
        notes = []
        if getattr(image, "is_animated", False) and image.format != "MPO":  # an MPO is a photograph with its previews
            notes.append(ANIMATED)
        deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))  # of which `load` leaves nothing
        image.load()
        _check_size(image)  # of an icon, it is that of the file in it
        if deep and image.mode in ("RGB", "RGBA") and np.asarray(image)[..., :3].max() < 16:
            raise BadImage(HELD_TOO_LITTLE)
        if image.getexif().get(_ORIENTATION, 1) in range(2, 9):
            notes.append(ROTATED)
        rgb, mode_note = _to_rgb(ImageOps.exif_transpose(image))
        return rgb, notes + mode_note


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    """The opened image, if its size is acceptable; any error inside the `with` becomes a BadImage."""
    try:
        if not (len(source) if isinstance(source, bytes) else source.stat().st_size):
            raise BadImage("image file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF blocks
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
                _check_size(image)
                yield image
    except BadImage:
        raise
    except FileNotFoundError:
        raise BadImage("image file not found") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"image has more than {MAX_PIXELS // 10**6} million pixels") from None
    except Exception as error:  # decoders meet broken files with anything from struct.error to ZeroDivisionError
        truncated = "truncated" in str(error).lower()
        raise BadImage("image file is truncated" if truncated else "image cannot be read") from error


@cache
def _formats() -> list[str]:
    """What may be opened, the usual formats first."""
    Image.preinit()
    Image.init()
    return [name for name in Image.ID if name not in PROGRAMS]


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if not width or not height:
        raise BadImage("image has zero size")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"image is more than {MAX_ASPECT} times longer than wide")


def _to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled_to_8_bits(image).convert("RGB"), [DEEP]
    notes = {"P": [PALETTE], "PA": [PALETTE], "CMYK": [CMYK]}.get(image.mode, [])
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if np.asarray(rgba)[..., 3].min() < 255:
            # Not convert("RGB"), which shows whatever colour lies under the transparent pixels: often black on black.
            rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            notes = [*notes, TRANSPARENT]
        return rgba.convert("RGB"), notes
    return image.convert("RGB"), notes


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey values of up to 16 bits from the range of 8, 10, 12 or 16 bits that holds them, others from their own.

    Cameras and scanners keep 10 or 12 bits in 16. Pillow's own convert("RGB") clips at 255: a white picture.
    """
    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if image.mode != "F" and low >= 0 and high < 2**16:
        low, high = 0.0, next(2.0**bits - 1 for bits in (8, 10, 12, 16) if high < 2**bits)
    return Image.fromarray(((values - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8))


def thumbnail(image: Image.Image | None, side: int) -> Image.Image | None:
    """A copy in RGB of at most `side` x `side` pixels; None if there is no image, or none that can be shown."""
    try:
        copy = image and image.convert("RGB")
        if copy is not None:
            copy.thumbnail((side, side))
        return copy
    except Exception:  # whatever is wrong with an image costs no more than the image
        return None


def side_by_side(images: Sequence[Image.Image], side: int) -> Image.Image | None:
    """Those that can be shown, each of at most `side` x `side` pixels, in a row on white; None if there is none."""
    shown = [small for image in images if (small := thumbnail(image, side)) is not None]
    if len(shown) < 2:
        return shown[0] if shown else None
    row = Image.new("RGB", (sum(image.width for image in shown), max(image.height for image in shown)), "white")
    for number, image in enumerate(shown):
        row.paste(image, (sum(before.width for before in shown[:number]), 0))
    return row
