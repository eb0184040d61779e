"""Originals beside reconstructions: the first private samples, and what each cell made of them.

Cells that attacked the same samples on the same network share one row of originals. Guesses are
matched to the truth as the oracle matches them. A reconstruction is shown over its own full range
of intensities, since several attacks recover shapes only up to scale; nothing else is done to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from experiments.report_cells import Cell
from experiments.report_figures import png
from leakbed.cards import Card
from leakbed.metrics import abs_pearson
from leakbed.oracle import match_images

SHOWN = 8
"""Samples shown of each cell: the first ones, not chosen ones."""


class Picture(NamedTuple):
    """One image of a strip.

    Attributes:
        source: A data URI.
        caption: What stands below it.
    """

    source: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One cell's reconstructions, or why there are none.

    Attributes:
        cell: The cell.
        pictures: In the order of the originals.
        note: Why there are no pictures, or nothing to compare them with.
    """

    cell: Cell
    pictures: tuple[Picture, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Cells that attacked the same private samples on the same network.

    Attributes:
        originals: The private images; empty for cells without pictures.
        strips: One per cell.
    """

    originals: tuple[Picture, ...]
    strips: tuple[Strip, ...]


class _NothingToShowError(ValueError):
    """A cell's files hold no pictures; the message says why."""


class _Evidence(NamedTuple):
    """What a cell's files hold, rows matched and flattened."""

    truths: Float[Tensor, " samples channels height width"]
    labels: list[str]
    guesses: Float[Tensor, " samples channels height width"]
    failed: list[bool]
    digests: list[str]


def blocks(folder: Path, found: Sequence[Cell]) -> list[Block]:
    """Lay out the pictures of a results folder.

    Args:
        folder: Holds ``guesses`` and ``truths``.
        found: The cells to show, in order.

    Returns:
        Blocks with originals first, then one of the cells without, each with the reason.
    """
    groups: list[list[tuple[Cell, _Evidence]]] = []
    without: list[Strip] = []
    for cell in found:
        try:
            if cell.first.status == "unscored":
                without.append(_unscored(folder, cell))
                continue
            files = _evidence(folder, cell.first)
        except _NothingToShowError as reason:
            without.append(Strip(cell=cell, note=str(reason)))
            continue
        home = next((group for group in groups if _fits(group[0], cell, files)), None)
        if home is None:
            groups.append([(cell, files)])
        else:
            home.append((cell, files))
    laid = [_block(members) for members in groups]
    return [*laid, *([Block(originals=(), strips=tuple(without))] if without else [])]


def samples(folder: Path, cards: Iterable[Card]) -> dict[str, str]:
    """Return what identifies the private samples each card attacked, by the card's key.

    Args:
        folder: Holds ``truths``.
        cards: The cards.

    Returns:
        Equal texts for equal sets of samples, in whatever order; a card whose truth is not there
        shares its samples with none.
    """
    found = {}
    for card in cards:
        try:
            truths = _tensor(folder / "truths" / f"{card.key}.safetensors", "images")
        except _NothingToShowError:
            continue
        digests = sorted(_digest(image) for image in truths.flatten(0, 1))
        found[card.key] = hashlib.sha256("".join(digests).encode()).hexdigest()
    return found


def _unscored(folder: Path, cell: Cell) -> Strip:
    """Show the guesses of a cell that was attacked without an answer key."""
    images = _tensor(folder / "guesses" / f"{cell.first.key}.safetensors", "images")
    shown = images.float().nan_to_num(0.5, 0.5, 0.5).flatten(0, 1)[:SHOWN]
    pictures = tuple(Picture(png(_stretched(image)), "") for image in shown)
    return Strip(cell=cell, pictures=pictures, note="Attacked without an answer key.")


def _evidence(folder: Path, card: Card) -> _Evidence:
    """Read a cell's guesses and truths, matched and flattened, or raise what is wrong with them."""
    guesses, truths = (folder / part / f"{card.key}.safetensors" for part in ("guesses", "truths"))
    images, true = _tensor(guesses, "images").float(), _tensor(truths, "images").float()
    if images.shape != true.shape:
        raise _NothingToShowError(
            f"{_short(guesses)} holds images of shape {tuple(images.shape)}, the truth "
            f"{tuple(true.shape)}: one of the two is of another run"
        )
    failed = _load(guesses).get("failed", torch.zeros(len(images))).bool()
    usable = images.isfinite().flatten(1).all(1) & ~failed
    safe = torch.where(usable[:, None, None, None, None], images, 0.5)
    order = match_images(safe, true)
    flat = true.flatten(0, 1)
    labels = _load(truths).get("labels")
    return _Evidence(
        truths=flat,
        labels=[str(int(label)) for label in labels.flatten()] if labels is not None else [],
        guesses=safe[torch.arange(len(safe))[:, None], order].flatten(0, 1),
        failed=[not bool(good) for good in usable.repeat_interleave(true.shape[1])],
        digests=[_digest(image) for image in flat],
    )


def _tensor(file: Path, name: str) -> Tensor:
    """Return one tensor of a file, or raise that it has none of that name."""
    tensors = _load(file)
    if name not in tensors:
        held = ", ".join(sorted(tensors)) or "nothing"
        raise _NothingToShowError(f"no pictures: {_short(file)} holds {held} only")
    return tensors[name]


def _load(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, or raise that it cannot be read."""
    if not file.is_file():
        raise _NothingToShowError(f"{_short(file)} is missing")
    try:
        return dict(load_file(file))
    except SafetensorError as error:
        raise _NothingToShowError(f"{_short(file)} cannot be read: {error}") from error


def _short(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def _digest(image: Tensor) -> str:
    return hashlib.sha256(image.contiguous().float().numpy().tobytes()).hexdigest()


def _fits(home: tuple[Cell, _Evidence], cell: Cell, files: _Evidence) -> bool:
    """Say whether a cell attacked the originals that a block shows."""
    first, own = home[0].first, cell.first
    same = (first.model, first.data) == (own.model, own.data)
    return same and set(_wanted(home[1])) <= set(files.digests)


def _wanted(reference: _Evidence) -> list[str]:
    """Return the samples that a block shows, each once."""
    return list(dict.fromkeys(reference.digests))[:SHOWN]


def _block(members: Sequence[tuple[Cell, _Evidence]]) -> Block:
    reference = members[0][1]
    wanted = _wanted(reference)
    originals = []
    for digest in wanted:
        index = reference.digests.index(digest)
        label = f"label {reference.labels[index]}" if reference.labels else ""
        originals.append(Picture(png(reference.truths[index]), label))
    strips = [
        Strip(
            cell=cell,
            pictures=tuple(_picture(files, files.digests.index(digest)) for digest in wanted),
        )
        for cell, files in members
    ]
    return Block(originals=tuple(originals), strips=_once(strips))


def _once(strips: Sequence[Strip]) -> tuple[Strip, ...]:
    """Leave out what needs no message and shows the same as it did in another setting."""
    shown: dict[tuple[str, tuple[Picture, ...]], Strip] = {}
    kept = []
    for strip in strips:
        same = (strip.cell.first.attack, strip.pictures)
        if strip.cell.is_attack or same not in shown:
            kept.append(strip)
        shown.setdefault(same, strip)
    return tuple(kept)


def _picture(files: _Evidence, index: int) -> Picture:
    guess, truth = files.guesses[index], files.truths[index]
    if files.failed[index]:
        return Picture(png(guess), "failed")
    score = float(abs_pearson(guess[None], truth[None])[0])
    return Picture(png(_stretched(guess)), f"{score:.2f}")


def _stretched(image: Float[Tensor, " channels height width"]) -> Tensor:
    """Return an image over its own full range; a constant one as it is, within [0, 1]."""
    low, high = image.min(), image.max()
    flat = bool(high - low <= 1e-6 * max(1.0, float(high.abs())))
    return image.clamp(0, 1) if flat else (image - low) / (high - low)
