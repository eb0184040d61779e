"""Pictures show targets as rows, enlarged, whatever the pixel values are."""

from pathlib import Path

import matplotlib.image
import pytest
import torch

from experiments.run.offline import write_pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_targets_are_rows_and_their_samples_columns(tmp_path: Path, channels: int) -> None:
    images = torch.zeros(2, 3, channels, 4, 5)
    images[1, 2] = 9.0  # out of range on purpose
    images[0, 0, 0, 0, 0] = torch.nan
    write_pictures(images, tmp_path / "new" / "sheet.png")
    pixels = matplotlib.image.imread(tmp_path / "new" / "sheet.png")
    assert pixels.shape[:2] == (2 * 4 * 4, 3 * 5 * 4)
    assert pixels[16:, 40:, :3].min() == 1
    assert pixels[:16, :, :3].max() == 0
    assert (tmp_path / "new" / "sheet.png").stat().st_mode & 0o077 == 0
