"""Damaged image files: each is read, or refused by name, and never ends in a traceback."""

from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from leakbed.data import BadDataError, TooLargeError, memory
from leakbed.data.folders import ENDINGS, read_folder
from tests.support.mutating import mutated

KINDS: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("png", "L", {}),
    ("png", "RGB", {}),
    ("png", "RGBA", {}),
    ("png", "P", {}),
    ("png", "1", {}),
    ("jpg", "L", {}),
    ("jpg", "RGB", {"progressive": True}),
    ("jpeg", "CMYK", {}),
    ("bmp", "L", {}),
    ("bmp", "RGB", {}),
    ("ppm", "RGB", {}),
    ("pgm", "L", {}),
    ("tif", "L", {}),
    ("tif", "RGB", {"compression": "tiff_lzw"}),
    ("tiff", "RGB", {"compression": "tiff_adobe_deflate"}),
    ("tiff", "1", {"compression": "group4"}),
    ("webp", "RGB", {}),
    ("webp", "RGB", {"lossless": True}),
)
FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF", "ppm": "PPM", "pgm": "PPM"}
FIRST, ALL = 200, 13_500


def encoded(kind: int) -> tuple[str, bytes]:
    """A whole file of a kind, and its ending."""
    ending, mode, options = KINDS[kind % len(KINDS)]
    noise = np.random.default_rng(kind).integers(0, 255, (17, 23, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).convert(mode).save(
        buffer, FORMATS.get(ending, ending.upper()), **options
    )
    return ending, buffer.getvalue()


def refused(folder: Path, number: int) -> bool:
    """Read a damaged file; say whether it was refused, by its name."""
    ending, content = encoded(number)
    file = folder / "cat" / f"{number}.{ending}"
    file.write_bytes(mutated(content, Random(number)))
    try:
        found = read_folder(folder, image_size=8 if number % 2 else None)
    except BadDataError as error:
        assert file.name in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        return True
    except TooLargeError:
        return True
    else:
        assert found.images.shape[0] == 1
        return False
    finally:
        file.unlink()


def test_every_ending_is_tried() -> None:
    assert {f".{ending}" for ending, _, _ in KINDS} == set(ENDINGS)


@pytest.mark.parametrize(
    "numbers",
    [
        range(FIRST),
        *(
            pytest.param(range(start, min(start + 1900, ALL)), marks=pytest.mark.reproduces)
            for start in range(FIRST, ALL, 1900)
        ),
    ],
    ids=str,
)
def test_damaged_images_are_read_or_refused_by_name(
    tmp_path: Path, numbers: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 10**9)  # whatever the machine has
    (tmp_path / "cat").mkdir()
    outcomes = [refused(tmp_path, number) for number in numbers]
    assert 0.2 < sum(outcomes) / len(outcomes) < 0.95
