"""UnSplit's published figures, and the promised speed; minutes, by hand."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.smashed_as_image import SmashedAsImage
from attacks.unsplit import UnSplit
from benchmarks.unsplit_targets import measured
from leakbed.contracts import Guess
from leakbed.models import Architecture
from leakbed.seeds import generator
from tests.support.budgets import ROUNDING, correlations
from tests.support.unsplit_reading import DIGIT, architecture, view_of


def digits(part: str) -> tuple[Tensor, Tensor]:
    root = os.environ.get("LEAKBED_DATA")
    folder = Path(root or "") / "MNIST" / "raw"
    if root is None or not folder.is_dir():
        pytest.skip("LEAKBED_DATA holds no MNIST/raw")
    pixels = np.fromfile(folder / f"{part}-images-idx3-ubyte", np.uint8)[16:]
    labels = np.fromfile(folder / f"{part}-labels-idx1-ubyte", np.uint8)[8:]
    return torch.from_numpy(pixels).reshape(-1, *DIGIT) / 255, torch.from_numpy(labels).long()


def trained_victim() -> nn.Sequential:
    pixels, labels = digits("train")
    victim = Architecture(name="mnistnet", image_shape=DIGIT, num_classes=10).build(777)
    adam = torch.optim.Adam(victim.parameters(), lr=1e-3, amsgrad=True)
    for batch in torch.randperm(len(pixels), generator=generator(0)).split(64):
        adam.zero_grad()
        nn.functional.cross_entropy(victim(pixels[batch]), labels[batch]).backward()
        adam.step()
    return victim


def pearson(guess: Guess, private: Tensor) -> Tensor:
    assert guess.images is not None
    pairs = zip(guess.images.flatten(1), private.flatten(1), strict=True)
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).abs()


@pytest.mark.reproduces
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("cut", "restarts", "bar"), [(1, 3, 0.98), (2, 1, 0.70)])
def test_mean_correlation_on_digits(cut: int, restarts: int, bar: float) -> None:
    victim = trained_victim()
    private, labels = digits("t10k")
    assert (victim(private).argmax(1) == labels).float().mean() > 0.965
    view = view_of(victim[: cut + 1], private[:32], architecture(cut))
    guess = UnSplit(outer_steps=300, restarts=restarts).run(view, seed=11)
    assert pearson(guess, private[:32]).mean() >= bar
    assert pearson(SmashedAsImage().run(view, seed=0), private[:32]).mean() > 0.7


@pytest.mark.reproduces
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cut", [1, 2])
def test_five_times_the_targets_per_second(cut: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ratio = measured(cut)["ratio"]
    torch.set_num_threads(threads)
    assert isinstance(ratio, float)
    assert ratio >= 5


@pytest.mark.reproduces
@pytest.mark.timeout(7200)
def test_doubling_the_budget_changes_little_for_targets_that_did_not_stop_on_it() -> None:
    """By target, since no budget up to 1,600 outer steps left a whole card without the mark."""
    private = digits("t10k")[0][:64]
    view = view_of(trained_victim()[:2], private, architecture(1))
    quick = UnSplit(input_steps=20, model_steps=20, input_rate=0.03, model_rate=0.01)
    once, twice = (replace(quick, outer_steps=steps).run(view, seed=11) for steps in (100, 200))
    assert once.stopped_on_budget is not None
    ended = ~once.stopped_on_budget
    assert ended.sum() >= 16, "enough for a standard error"
    before, after = (correlations(guess, private)[ended] for guess in (once, twice))
    error = before.std() / len(before) ** 0.5
    assert (before.mean() - after.mean()).abs() < 2 * error + ROUNDING
