"""Read one's own data from a function of one's own: ``package.module:function``."""

import inspect
from pathlib import Path
from typing import Any

import torch

from leakbed.data.dataset import BadDataError, Decoded
from leakbed.naming import imported

_WITHOUT_NAMES, _WITH_NAMES = 2, 3


def read_own(path: str, *, root: Path | None) -> Decoded:
    """Return what a user's function returns, as tensors; the caller checks their contents.

    A path that cannot be imported is a ``leakbed.naming.ImportPathError``.

    Args:
        path: ``package.module:function``. The function is called with the keyword ``root`` if it
            has it, and returns images and labels (NumPy or PyTorch), and perhaps class names.
        root: The folder of data sets, if one is set.

    Returns:
        Images, labels and classes; classes without names are called by their number.

    Raises:
        BadDataError: It is no function, or returns something else.
    """
    function = imported(path)
    if not callable(function):
        raise BadDataError(f"data set {path!r} is a {type(function).__name__}, not a function")
    takes_root = "root" in inspect.signature(function).parameters
    returned = function(root=root) if takes_root else function()
    if not isinstance(returned, tuple) or len(returned) not in {_WITHOUT_NAMES, _WITH_NAMES}:
        raise BadDataError(
            f"data set {path!r} returned a {type(returned).__name__}; return (images, labels) or "
            "(images, labels, class names)"
        )
    images, labels = (_tensor(path, value) for value in returned[:2])
    names = returned[2] if len(returned) == _WITH_NAMES else _numbers(path, labels)
    return Decoded(images=images, labels=labels, classes=tuple(str(name) for name in names))


def _numbers(path: str, labels: torch.Tensor) -> range:
    """Return 0 to the highest label, for classes without names."""
    if labels.is_floating_point() or not labels.numel():
        return range(1)  # refused later, with the reason
    highest = int(labels.to(torch.int64).max())
    if highest >= labels.numel():
        raise BadDataError(
            f"data set {path!r}: the highest label is {highest}, but there are only "
            f"{labels.numel()} labels; number the classes from 0 without gaps"
        )
    return range(highest + 1)


def _tensor(path: str, value: Any) -> torch.Tensor:  # noqa: ANN401  a user returned it
    """Return an array as a tensor that shares no memory with the user's."""
    try:
        return torch.as_tensor(value).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadDataError(
            f"data set {path!r} returned a {type(value).__name__} that is no array: {error}"
        ) from error
