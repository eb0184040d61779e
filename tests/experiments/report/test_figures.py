"""Figures are inline, deterministic and in the page's own ink."""

import base64
import errno
import os
import xml.etree.ElementTree as ET
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from experiments.report.figures import GLYPHS, MARKERS, Point, png, scatter


def point(**changes: float) -> Point:
    settings = {"utility": 0.9, "leakage": 0.5, "error": (0.1, 0.2)} | changes
    return Point(color="#0a84c6", marker="o", hollow=False, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB")])
def test_an_image_becomes_its_own_pixels(channels: int, mode: str) -> None:
    image = torch.linspace(-0.5, 1.5, channels * 20).reshape(channels, 4, 5)
    uri = png(image)
    assert uri.startswith("data:image/png;base64,")
    read = Image.open(BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert (read.mode, read.size) == (mode, (5, 4))
    first = np.array(read)[..., 0] if channels == 3 else np.array(read)
    assert np.abs(first / 255 - image[0].clamp(0, 1).numpy()).max() < 1 / 255


def test_a_scatter_is_one_element_without_prolog_or_fixed_ink() -> None:
    drawing = scatter([point(), point(utility=0.4)], utility="test accuracy", leakage="SSIM")
    text = drawing.inline()
    root = ET.fromstring(text)  # noqa: S314  our own text
    assert root.tag.endswith("svg")
    assert root.get("viewBox")
    assert root.get("width") is None
    assert root.get("aria-label") == "SSIM against test accuracy"
    assert "currentColor" in text
    assert "#010203" not in text
    assert "http://" not in text.replace("http://www.w3.org/", "")
    assert {"test accuracy", "SSIM"} <= set(root.itertext())


def test_equal_points_give_equal_text_and_none_still_an_empty_figure() -> None:
    args = {"utility": "a <b>", "leakage": "|Pearson| & co"}
    assert scatter([point()], **args).inline() == scatter([point()], **args).inline()
    ET.fromstring(scatter([], **args).inline())  # noqa: S314


def test_a_figure_is_saved_as_svg_and_pdf_with_text_as_text(tmp_path: Path) -> None:
    drawing = scatter([point()], utility="test accuracy", leakage="SSIM")
    svg, pdf = drawing.save(tmp_path, "ssim")
    assert (svg.name, pdf.name) == ("ssim.svg", "ssim.pdf")
    root = ET.fromstring(svg.read_text())  # noqa: S314
    assert {"test accuracy", "SSIM"} <= set(root.itertext())
    assert root.get("width")  # a size of its own, which the page's elements do not have
    first = pdf.read_bytes()
    assert first.startswith(b"%PDF")
    assert b"/FontFile2" in first  # TrueType: text that can be searched, no outlines
    drawing.save(tmp_path, "ssim")
    assert pdf.read_bytes() == first


def test_a_figure_whose_writing_breaks_off_leaves_the_older_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = scatter([point()], utility="test accuracy", leakage="SSIM")
    files = drawing.save(tmp_path, "ssim")
    before = [file.read_bytes() for file in files]

    def half(_: Figure, file: Path, **__: object) -> None:
        Path(file).write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space left") as caught:
        drawing.save(tmp_path, "ssim")
    assert caught.value.filename == str(tmp_path)
    assert [file.read_bytes() for file in files] == before
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_every_marker_has_a_glyph() -> None:
    assert set(GLYPHS) == set(MARKERS)
