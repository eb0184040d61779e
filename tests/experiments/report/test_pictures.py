"""Pictures: the first samples, matched, over their own range, and a reason where there are none."""

import base64
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from experiments.report.pictures import SHOWN, blocks, samples
from experiments.report.rows import cells
from experiments.results.cards import Card
from leakbed.contracts import Evidence

MakeCard = Callable[..., Card]
Leave = Callable[..., Path]


def pixels(source: str) -> Tensor:
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    return torch.from_numpy(np.array(Image.open(BytesIO(data)))).float() / 255


def test_originals_and_reconstructions_are_the_first_samples(
    make_card: MakeCard, leave: Leave, private: Tensor
) -> None:
    card = make_card()
    folder = leave(card, guess=1 - private)
    (block,) = blocks(folder, cells([card]))
    assert len(block.originals) == len(block.strips[0].pictures) == SHOWN
    assert [picture.caption for picture in block.originals[:2]] == ["label 0", "label 1"]
    assert torch.allclose(pixels(block.originals[3].source), private[3, 0, 0], atol=1 / 255)
    # An inverted image correlates fully; it is stretched but not turned round.
    shown = block.strips[0].pictures[3]
    assert shown.caption == "1.00"
    inverted = 1 - private[3, 0, 0]
    stretched = (inverted - inverted.min()) / (inverted.max() - inverted.min())
    assert torch.allclose(pixels(shown.source), stretched, atol=1 / 255)


def test_rows_are_matched_to_the_truth(make_card: MakeCard, leave: Leave, private: Tensor) -> None:
    card, true = make_card(), private.reshape(2, 8, 1, 12, 12)
    folder = leave(card, guess=true.flip(1), truth=true)
    (block,) = blocks(folder, cells([card]))
    assert {picture.caption for picture in block.strips[0].pictures} == {"1.00"}


def test_cells_of_the_same_samples_share_their_originals(
    make_card: MakeCard, leave: Leave, private: Tensor
) -> None:
    first, other = make_card(), make_card(cut=2)
    leave(first)
    folder = leave(other, truth=private.flip(0))
    (block,) = blocks(folder, cells([first, other]))
    assert len(block.strips) == 2
    # The second cell attacked them in another order; it is shown in the first one's.
    assert block.strips[1].pictures == block.strips[0].pictures


def test_what_reads_no_message_is_shown_once(make_card: MakeCard, leave: Leave) -> None:
    cards = [make_card(attack="mean-image", reads=Evidence.NOTHING, cut=cut) for cut in (1, 2)]
    for card in cards:
        folder = leave(card)
    (block,) = blocks(folder, cells(cards))
    assert len(block.strips) == 1


def test_other_samples_or_networks_get_originals_of_their_own(
    make_card: MakeCard, leave: Leave, private: Tensor
) -> None:
    cards = [make_card(), make_card(cut=2), make_card(model="lenet-sigmoid")]
    leave(cards[0])
    leave(cards[1], truth=private * 0.9)
    folder = leave(cards[2])
    assert [len(block.strips) for block in blocks(folder, cells(cards))] == [1, 1, 1]


def test_failed_targets_are_marked(make_card: MakeCard, leave: Leave, private: Tensor) -> None:
    card, guess = make_card(), private.clone()
    guess[1] = float("nan")
    folder = leave(card, guess=guess, failed=torch.arange(16) == 2)
    (block,) = blocks(folder, cells([card]))
    captions = [picture.caption for picture in block.strips[0].pictures]
    assert captions == ["1.00", "failed", "failed", *["1.00"] * 5]


def test_missing_and_broken_files_are_said(make_card: MakeCard, leave: Leave) -> None:
    cards = [make_card(cut=cut) for cut in range(1, 5)]
    for card in cards:
        folder = leave(card)
    keys = [card.key for card in cards]
    (folder / "guesses" / f"{keys[0]}.safetensors").unlink()
    (folder / "guesses" / f"{keys[1]}.safetensors").write_bytes(b"not safe")
    (folder / "truths" / f"{keys[2]}.safetensors").unlink()
    leave(cards[3], guess=torch.zeros(16, 1, 1, 5, 5))
    (block,) = blocks(folder, cells(cards))
    notes = [strip.note for strip in block.strips]
    assert notes[0] == f"guesses/{keys[0]}.safetensors is missing"
    assert notes[1].startswith(f"guesses/{keys[1]}.safetensors cannot be read")
    assert notes[2] == f"truths/{keys[2]}.safetensors is missing"
    assert "(16, 1, 1, 5, 5)" in notes[3]
    assert all(strip.pictures == () for strip in block.strips)


def test_cells_that_guess_labels_alone_are_in_no_block(make_card: MakeCard, leave: Leave) -> None:
    cards = [make_card(), make_card(cut=2)]
    leave(cards[0])
    folder = leave(cards[1])
    labels = {"labels": torch.zeros(16, 1), "failed": torch.zeros(16)}
    save_file(labels, folder / "guesses" / f"{cards[1].key}.safetensors")
    (block,) = blocks(folder, cells(cards))
    assert [strip.cell.first.key for strip in block.strips] == [cards[0].key]


def test_guesses_without_an_answer_key_are_shown_alone(make_card: MakeCard, leave: Leave) -> None:
    card = make_card(status="unscored")
    folder = leave(card)
    (folder / "truths" / f"{card.key}.safetensors").unlink()
    (block,) = blocks(folder, cells([card]))
    assert block.originals == ()
    assert len(block.strips[0].pictures) == SHOWN
    assert block.strips[0].note == "Attacked without an answer key."


def test_samples_are_equal_in_any_order(make_card: MakeCard, leave: Leave, private: Tensor) -> None:
    cards = [make_card(cut=cut) for cut in range(1, 5)]
    leave(cards[0])
    leave(cards[1], truth=private.flip(0).reshape(4, 4, 1, 12, 12))
    folder = leave(cards[2], truth=private[:8])
    found = samples(folder, cards)
    assert found[cards[0].key] == found[cards[1].key]
    assert found[cards[0].key] != found[cards[2].key]
    assert cards[3].key not in found


def test_a_constant_guess_keeps_its_grey(make_card: MakeCard, leave: Leave) -> None:
    card = make_card()
    folder = leave(card, guess=torch.full((16, 1, 1, 12, 12), 0.2))
    (block,) = blocks(folder, cells([card]))
    shown = block.strips[0].pictures[0]
    assert shown.caption == "0.00"
    assert torch.allclose(pixels(shown.source), torch.tensor(0.2), atol=1 / 255)
