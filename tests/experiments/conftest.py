"""Synthetic results: cards with chosen numbers, and the guesses and truths beside them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.results.cards import Card, Threat, card_key, write_card
from leakbed.contracts import Evidence, Knowledge, Seat, ThreatModel
from leakbed.oracle.metrics import RATES

READS = {
    "fedavg": frozenset({Evidence.UPDATE}),
    "vanilla-split": frozenset({Evidence.SMASHED}),
}
BASELINES: dict[str, dict[str, float | None]] = {
    "mean-public": {"identification": 0.001, "abs_pearson": 0.55, "ssim": 0.3, "mse": 0.07},
    "another-row": {"identification": 0.0, "abs_pearson": 0.4, "ssim": 0.37, "mse": 0.1},
    "nearest-public": {"identification": 0.0, "abs_pearson": 0.9, "ssim": 0.77, "mse": 0.02},
    "chance": {"identification": 0.001, "label_accuracy": 0.1},
}

MakeCard = Callable[..., Card]
Leave = Callable[..., Path]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """A metric as the oracle writes it."""
    wide = torch.tensor(values, dtype=torch.float64)
    many = len(values) > 1
    return {
        "mean": float(wide.mean()),
        "std": float(wide.std()) if many else None,
        "stderr": float(wide.std() / len(values) ** 0.5) if many else None,
        "values": list(values),
        "interval": None,
    }


@pytest.fixture
def scores() -> Callable[..., dict[str, Any]]:
    """Scores of the given means, each with a small spread over 16 targets."""

    def made(*, targets: int = 16, **means: float) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, mean in means.items():
            if name in RATES:
                hits = round(mean * targets)
                found[name] = summary([1.0] * hits + [0.0] * (targets - hits))
            else:
                found[name] = summary([mean + 0.01 * (-1) ** place for place in range(targets)])
        return {**found, "targets": targets, "rows": 1, "candidates": 1000, "failures": 0}

    return made


@pytest.fixture
def make_card(scores: Callable[..., dict[str, Any]]) -> MakeCard:
    """A scored card of UnSplit: ``means`` sets scores, ``reads`` evidence, others any field."""

    def made(
        *, means: dict[str, float] | None = None, reads: Evidence | None = None, **changes: Any
    ) -> Card:
        protocol = changes.get("protocol", "vanilla-split")
        threat = ThreatModel(
            seat=Seat.SERVER,
            evidence=frozenset({reads}) if reads else READS[protocol],
            needs=frozenset({Knowledge.ARCHITECTURE}),
        )
        defense = changes.get("defense", "none")
        settings = {
            "seed": changes.get("seed", 0),
            "model": {"name": changes.get("model", "mnistnet"), "activation": "softplus"},
            "defense": {"stack": [] if defense == "none" else [[defense, {}]]},
            **changes.pop("settings", {}),
        }
        fields: dict[str, Any] = {
            "case": "split" if protocol == "vanilla-split" else "fedavg",
            "protocol": protocol,
            "data": "mnist-5k",
            "model": "mnistnet",
            "cut": 1,
            "nodes": 4,
            "attack": "unsplit",
            "seed": 0,
            "threat": Threat.of(threat),
            "settings": settings,
            "scores": scores(
                **(means or {"identification": 1.0, "abs_pearson": 0.97, "ssim": 0.8})
            ),
            "baselines": BASELINES,
            "control": {"within": True, "scores": {}, "baseline": {}, "above": []},
            "utility": {"test_accuracy": 0.95},
            "cost": {"seconds": 12.0, "attack_seconds": 90.0, "bytes_up": 2048.0},
            "version": "0.1.0",
            "source": "0123456789abcdef",
        } | changes
        if fields.get("status", "done") != "done":
            fields |= {"scores": {}, "baselines": {}, "control": None}
        told = {name: str(fields[name]) for name in fields if name != "scores"}
        return Card(**({"key": card_key(told, "code")} | fields))

    return made


@pytest.fixture
def private() -> Tensor:
    """Sixteen private images of one row each."""
    return torch.rand(16, 1, 1, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def leave(tmp_path: Path, private: Tensor) -> Leave:
    """Write a card with its guesses and truths into a results folder, and return the folder."""

    def left(
        card: Card, *, guess: Tensor | None = None, truth: Tensor | None = None, **more: Tensor
    ) -> Path:
        folder = tmp_path / "my-results"
        write_card(card, folder)
        true = private if truth is None else truth
        images = true * 0.5 if guess is None else guess
        for part, tensors in (
            ("guesses", {"images": images, **more}),
            ("truths", {"images": true, "labels": torch.arange(true[:, :, 0, 0, 0].numel())}),
        ):
            (folder / part).mkdir(exist_ok=True)
            save_file(tensors, folder / part / f"{card.key}.safetensors")
        return folder

    return left
