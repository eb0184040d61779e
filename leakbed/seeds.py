"""Seeds are streams: independent generators, each derived by hash from (seed, role).

No attack, view or message ever holds a cell's seed, so an adversary's fresh clone cannot be the
victim's initial weights. Source of the construction: a hash of a label under a key, as in
counter-based generators; SHA-256 keeps streams of different roles independent.
"""

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_MASK = (1 << 63) - 1  # torch.Generator and Flower's records both take signed 64-bit integers


def derive(seed: int, role: str) -> int:
    """Return the stream of a role: a pure function of both.

    Args:
        seed: A cell's seed, or another stream.
        role: What the stream is for, such as ``"victim-init"`` or ``"node/3"``.

    Returns:
        A number in [0, 2**63).
    """
    digest = hashlib.sha256(f"{seed}/{role}".encode()).digest()
    return int.from_bytes(digest[:8], "little") & _MASK


def generator(stream: int) -> "torch.Generator":
    """Return a CPU generator at the start of a stream."""
    import torch  # noqa: PLC0415  this module must import without torch

    return torch.Generator().manual_seed(stream)


@contextmanager
def guarded() -> Iterator[None]:
    """Restore the global generators of random, numpy and torch on leaving.

    torch is covered when the process has imported it, CUDA when it was initialised.
    """
    python, numeric = random.getstate(), np.random.get_state()  # noqa: NPY002  restored, not used
    torch = sys.modules.get("torch")
    cpu = torch.get_rng_state() if torch else None
    cuda = torch.cuda.get_rng_state_all() if torch and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numeric)  # noqa: NPY002
        if torch and cpu is not None:
            torch.set_rng_state(cpu)
        if torch and cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def scoped(stream: int) -> Iterator[None]:
    """Seed the global generators from a stream, and restore them on leaving.

    For interfaces that take no generator: layer initialisers, dropout, Flower's node sampling.

    Args:
        stream: The stream to draw from inside the block.
    """
    with guarded():
        random.seed(stream)
        np.random.seed(stream % (1 << 32))  # noqa: NPY002  the global one is the point here
        if torch := sys.modules.get("torch"):
            torch.manual_seed(stream)
        yield
