"""Flower's own differential privacy: at work on weight updates, refused on split messages."""

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg

from clients import fedavg, node
from clients.node import one_torch_thread
from defenses import LocalDP, WeightNoise
from leakbed.contracts import Defense, IllegalCombinationError
from leakbed.events import Event, UpdateUp
from leakbed.grids import LocalGrid
from leakbed.seeds import derive, scoped
from leakbed.tap.wiretap import Wiretap
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("identity")

CLIP = 0.01


def averaging() -> FedAvg:
    return FedAvg(
        fraction_evaluate=0.0, min_train_nodes=2, min_evaluate_nodes=0, min_available_nodes=2
    )


def trained(mod: Any) -> Any:
    """The mod around the training alone: the harness's messages carry no weights."""

    def chosen(message: Any, context: Any, call_next: Any) -> Any:
        if message.metadata.message_type != "train":
            return call_next(message, context)
        return mod(message, context, call_next)

    return chosen


def updates(mod: Any = None, strategy: Any = None) -> list[UpdateUp]:
    """Two nodes' updates in one round of FedAvg, as the server's wiretap sees them."""
    app = ClientApp(mods=[one_torch_thread] if mod is None else [one_torch_thread, trained(mod)])
    for family in (node, fedavg):
        family.register(app)
    grid = LocalGrid(app, nodes=2)
    tiny.set_up(grid, 2, plan=tiny.plan())
    seen: list[Event] = []
    tap = Wiretap(grid, [seen.append], roster=grid.roster, strict=True)
    model = tiny.architecture().build(derive(tiny.SEED, "victim-init"))
    with scoped(3):
        (strategy or averaging()).start(tap, ArrayRecord(dict(model.state_dict())), num_rounds=1)
    found = sorted((e for e in seen if isinstance(e, UpdateUp)), key=lambda event: event.node)
    assert [event.node for event in found] == [0, 1]
    return found


def move(event: UpdateUp) -> np.ndarray[Any, np.dtype[np.float64]]:
    parts = [(event.after[n] - event.before[n]).ravel() for n in sorted(event.before)]
    return np.concatenate(parts).astype(np.float64)


def test_local_privacy_clips_and_noises_what_the_wiretap_sees() -> None:
    plain = [move(event) for event in updates()]
    quiet = [move(event) for event in updates(LocalDpMod(CLIP, 0.0, 1.0, 1e-5))]
    for own, clipped in zip(plain, quiet, strict=True):
        norm = np.linalg.norm(own)
        assert norm > 2 * CLIP
        np.testing.assert_allclose(clipped, own * CLIP / norm, atol=1e-6)
    noisy = [move(event) for event in updates(LocalDpMod(CLIP, CLIP, 2.0, 1e-5))]
    deviation = CLIP * np.sqrt(2 * np.log(1.25e5)) / 2.0
    noise = np.concatenate(noisy) - np.concatenate(quiet)
    assert noise.std() == pytest.approx(deviation, rel=0.15)  # 376 draws: 4 %
    assert LocalDP(epsilon=2.0, delta=1e-5, clip=CLIP).deviation == pytest.approx(deviation)


@pytest.mark.parametrize(
    "defense",
    [
        WeightNoise(form="corrected", scale=0.0, clip=CLIP),
        LocalDP(epsilon=1.0, clip=CLIP, sensitivity=0.0),
    ],
    ids=lambda defense: defense.name,
)
def test_its_clipping_is_that_of_our_defenses(defense: Defense) -> None:
    (event, _), (clipped, _) = updates(), updates(LocalDpMod(CLIP, 0.0, 1.0, 1e-5))
    before, after = (
        {name: torch.tensor(value) for name, value in arrays.items()}
        for arrays in (event.before, event.after)
    )
    _, sent = defense.protect_update(defense.begin(1), before, after)
    for name, value in sent.items():
        torch.testing.assert_close(value, torch.tensor(clipped.after[name]), atol=1e-6, rtol=0)


def test_central_privacy_with_clients_that_clip_leaves_clipped_updates_to_see() -> None:
    strategy = DifferentialPrivacyClientSideFixedClipping(averaging(), 0.1, CLIP, 2)
    norms = [float(np.linalg.norm(move(event))) for event in updates(fixedclipping_mod, strategy)]
    assert norms
    assert norms == pytest.approx([CLIP] * len(norms), rel=1e-4)


def test_central_privacy_around_a_split_strategy_is_refused() -> None:
    settings = tiny.plan()
    inner = tiny.split_strategy(settings=settings)
    wrapped = DifferentialPrivacyClientSideFixedClipping(inner, 0.1, CLIP, 1)
    with pytest.raises(IllegalCombinationError, match=r"wrappers clip and noise weight updates"):
        wrapped.start(tiny.ready(plan=settings), inner.part.arrays(), num_rounds=1)
