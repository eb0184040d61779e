"""Originals beside reconstructions: the first private samples, and what each cell made of them.

Altered inputs stand under the natural ones with the difference enlarged, and under each what the
node's whole network says of it.

Cells that attacked the same samples on the same network share one row of originals. Guesses are
matched to the truth as the oracle matches them. A reconstruction is shown over its own full range
of intensities, since several attacks recover shapes only up to scale; nothing else is done to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from experiments.report.figures import png
from experiments.report.rows import Row
from experiments.results.cards import Card
from leakbed.oracle import match_images
from leakbed.oracle.metrics import abs_pearson

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

    cell: Row
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


def blocks(folder: Path, found: Sequence[Row]) -> list[Block]:
    """Lay out the pictures of a results folder.

    Args:
        folder: Holds ``guesses`` and ``truths``.
        found: The cells to show, in order.

    Returns:
        Blocks with originals first, then one of the cells without, each with the reason. A cell
        that guessed no images, but labels or attributes, is in none; one that altered images has a
        block of its own.
    """
    groups: list[list[tuple[Row, _Evidence]]] = []
    without: list[Strip] = []
    altered: list[Block] = []
    for cell in found:
        try:
            held = _load(folder / "guesses" / f"{cell.first.guess_key}.safetensors")
            if "adversarial" in held:
                altered.append(_altered(folder, cell))
            if "images" not in held:
                continue
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
    laid += altered
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
            truths = _tensor(folder / "truths" / f"{card.guess_key}.safetensors", "images")
        except _NothingToShowError:
            continue
        digests = sorted(_digest(image) for image in truths.flatten(0, 1))
        found[card.key] = hashlib.sha256("".join(digests).encode()).hexdigest()
    return found


def _altered(folder: Path, cell: Row) -> Block:
    """Show natural inputs, those altered within the first budget, and the difference enlarged."""
    key = cell.first.guess_key
    images = _tensor(folder / "guesses" / f"{key}.safetensors", "adversarial").float()[:SHOWN, 0]
    truths = folder / "truths" / f"{key}.safetensors"
    natural = _tensor(truths, "images").float()[:SHOWN, 0]
    labels = _tensor(truths, "labels").flatten()[:SHOWN].tolist()
    evasion: Any = cell.first.scores.get("evasion")
    said = evasion["answers"] if evasion else {"natural": [], "altered": []}
    budget = evasion["budgets"][0]["budget"] if evasion else 0.5
    before = [f"label {label}" for label in labels]
    before = (
        [f"{name}, answer {said['natural'][i]}" for i, name in enumerate(before)]
        if evasion
        else before
    )
    after = [f"answer {row[0]}" for row in said["altered"][:SHOWN]] or [""] * len(labels)
    apart = (images - natural) / (2 * budget) + 0.5
    return Block(
        originals=_captioned(natural, before),
        strips=(
            Strip(cell=cell, pictures=_captioned(images, after)),
            Strip(
                cell=cell,
                pictures=_captioned(apart, [""] * len(labels)),
                note=f"The difference, enlarged {1 / (2 * budget):.3g} times about grey: black and "
                f"white are the budget of {budget:g}.",
            ),
        ),
    )


def _captioned(images: Tensor, captions: Sequence[str]) -> tuple[Picture, ...]:
    return tuple(
        Picture(png(image.clamp(0, 1)), text) for image, text in zip(images, captions, strict=True)
    )


def _unscored(folder: Path, cell: Row) -> Strip:
    """Show the guesses of a cell that was attacked without an answer key."""
    images = _tensor(folder / "guesses" / f"{cell.first.guess_key}.safetensors", "images")
    shown = images.float().nan_to_num(0.5, 0.5, 0.5).flatten(0, 1)[:SHOWN]
    pictures = tuple(Picture(png(_stretched(image)), "") for image in shown)
    return Strip(cell=cell, pictures=pictures, note="Attacked without an answer key.")


def _evidence(folder: Path, card: Card) -> _Evidence:
    """Read a cell's guesses and truths, matched and flattened, or raise what is wrong with them."""
    guesses, truths = (
        folder / part / f"{card.guess_key}.safetensors" for part in ("guesses", "truths")
    )
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


def _fits(home: tuple[Row, _Evidence], cell: Row, files: _Evidence) -> bool:
    """Say whether a cell attacked the originals that a block shows."""
    first, own = home[0].first, cell.first
    same = (first.model, first.data) == (own.model, own.data)
    return same and set(_wanted(home[1])) <= set(files.digests)


def _wanted(reference: _Evidence) -> list[str]:
    """Return the samples that a block shows, each once."""
    return list(dict.fromkeys(reference.digests))[:SHOWN]


def _block(members: Sequence[tuple[Row, _Evidence]]) -> Block:
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
