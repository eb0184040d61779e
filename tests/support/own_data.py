"""Data as a user would bring them, legal and not; imported by path in the tests."""

from pathlib import Path

import numpy as np
import torch

LABELS = np.arange(12) % 3


def grey_bytes() -> tuple[np.ndarray, np.ndarray]:
    images = np.zeros((12, 4, 5), dtype=np.uint8)
    images[3] = 255
    return images, LABELS


def colour_floats() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    images = torch.linspace(0, 1, 12 * 3 * 16, dtype=torch.float64).reshape(12, 3, 4, 4)
    return images, torch.from_numpy(LABELS), ["cat", "dog", "eel"]


def from_root(root: Path) -> tuple[np.ndarray, np.ndarray]:
    return np.load(root / "images.npy"), LABELS


def _with(images: object = None, labels: object = None) -> tuple[object, object]:
    floats = np.full((12, 1, 4, 4), 0.5, dtype=np.float32)
    return floats if images is None else images, LABELS if labels is None else labels


def normalised() -> tuple[object, object]:
    return _with(np.full((12, 1, 4, 4), -1.5, dtype=np.float32))


def not_finite() -> tuple[object, object]:
    images = np.full((12, 1, 4, 4), 0.5, dtype=np.float32)
    images[7, 0, 0, 0] = np.nan
    return _with(images)


def wide_integers() -> tuple[object, object]:
    return _with(np.full((12, 1, 4, 4), 3, dtype=np.int32))


def flat() -> tuple[object, object]:
    return _with(np.zeros((12, 16), dtype=np.float32))


def nothing() -> tuple[object, object]:
    return _with(np.zeros((0, 1, 4, 4), dtype=np.float32), np.zeros(0, dtype=np.int64))


def few_labels() -> tuple[object, object]:
    return _with(labels=LABELS[:5])


def float_labels() -> tuple[object, object]:
    return _with(labels=LABELS + np.nan)


def negative_labels() -> tuple[object, object]:
    return _with(labels=LABELS - 1)


def gap_in_labels() -> tuple[object, object]:
    return _with(labels=2 * LABELS)


def huge_label() -> tuple[object, object]:
    return _with(labels=LABELS + 10**12)


def too_few_names() -> tuple[object, object, list[str]]:
    return (*_with(), ["cat", "dog"])


def one_thing() -> np.ndarray:
    return _with()[0]


def no_arrays() -> tuple[str, str]:
    return "images", "labels"


def breaks() -> tuple[object, object]:
    raise RuntimeError("no such server")


def demanding(folder: str) -> tuple[object, object]:
    return _with()


NOT_A_FUNCTION = 3


def channels_last() -> tuple[object, object]:
    return _with(np.zeros((12, 16, 16, 3), dtype=np.uint8))


def grey_channel_last() -> tuple[object, object]:
    return _with(np.zeros((12, 16, 8, 1), dtype=np.uint8))


def rows_last() -> tuple[object, object]:
    return _with(np.zeros((16, 16, 3, 12), dtype=np.uint8))


def many_narrow_channels() -> tuple[object, object]:
    return _with(np.full((12, 30, 1, 1), 100, dtype=np.uint8))


def just_over_one() -> tuple[object, object]:
    images = np.full((12, 1, 4, 4), 1.0000001)
    images[0] = -1e-9
    return _with(images)


def over_one() -> tuple[object, object]:
    images = np.full((12, 1, 4, 4), 0.25)
    images[5, 0, 0, 0] = 1.00001
    return _with(images)


def sparse() -> tuple[object, object]:
    return _with(torch.zeros(12, 1, 4, 4).to_sparse())


def eight_bit_floats() -> tuple[object, object]:
    return _with(torch.zeros(12, 1, 4, 4).to(torch.float8_e5m2))


def nowhere() -> tuple[object, object]:
    return _with(torch.zeros(12, 1, 4, 4, device="meta"))


def one_hot() -> tuple[object, object]:
    return _with(labels=np.eye(3, dtype=np.int64)[LABELS])


def names_of_bytes() -> tuple[object, object, list[str]]:
    return (*_with(), ["cat", "dog", "\udce9"])


def names_that_are_none() -> tuple[object, object, int]:
    return (*_with(), 3)


def leaves() -> tuple[object, object]:
    raise SystemExit(3)


class Lazy:
    """A class whose instances return data when called; it takes no signature apart."""

    __signature__ = "none"

    def __call__(self) -> tuple[object, object]:
        return _with()


lazy = Lazy()
