"""The simulated bottom: its terms, its step against a slow reading, and what it refuses."""

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from attacks.building_blocks.likeness import kernel_distance
from attacks.building_blocks.simulated_bottom import SimulatedBottom
from leakbed.contracts import (
    Knowledge,
    MissingKnowledgeError,
    Seat,
    UnfitViewError,
    View,
    Watcher,
)
from leakbed.models import Architecture
from leakbed.seeds import derive, scoped

SHAPE, CLASSES, ROWS = (1, 6, 6), 3, 8


@dataclass(frozen=True, kw_only=True)
class Bare(SimulatedBottom):
    """No term has a weight unless a test gives it one."""

    steps: int = 3
    batch_rows: int = 4

    name: ClassVar[str] = "bare"
    source: ClassVar[str] = "https://example.org"


def noise(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def architecture(*, upper: int | None = None) -> Architecture:
    return Architecture(
        name="tests.support.hijackable:blocks",
        image_shape=SHAPE,
        num_classes=CLASSES,
        cut=2,
        upper_cut=upper,
    )


def view(*, upper: int | None = None, **changes: Any) -> View:
    layers = architecture(upper=upper)
    smashed = layers.bottom(9)(noise(ROWS, *SHAPE, seed=0)).detach()
    part = layers.top(9) if upper is None else layers.middle(9)
    known: dict[str, Any] = {
        "seat": Seat.SERVER,
        "image_shape": SHAPE,
        "num_classes": CLASSES,
        "targets": ROWS,
        "smashed": smashed,
        "round_smashed": smashed,
        "round_labels": torch.arange(ROWS) % CLASSES,
        "architecture": layers,
        "server_part": part.eval().requires_grad_(requires_grad=False),
        "public_images": noise(12, *SHAPE, seed=1),
        "public_labels": torch.arange(12) % CLASSES,
        "device": torch.device("cpu"),
    }
    return View(**known | changes)


ALL = {"task": 1.0, "critic": 0.2, "mmd": 0.8, "moments": 0.5, "prior": 0.3}


def test_the_first_steps_are_those_of_a_literal_reading() -> None:
    """Simulator first; critic on the rows it was shown; decoder on the stepped simulator."""
    attack = Bare(task=1.0, critic=0.2, mmd=0.8, critic_rate=1e-2)
    opening = view(smashed_shape=(6, 3, 3), rows=4)
    state, slow = attack.begin(opening, seed=5), attack.begin(opening, seed=5)
    part = opening.server_part
    assert part is not None
    assert slow.critic is not None
    assert slow.decoder is not None
    adams = {
        "e": Adam(slow.simulator.parameters(), lr=1e-3),
        "c": Adam(slow.critic.parameters(), lr=1e-2, betas=(0.5, 0.999)),
        "d": Adam(slow.decoder.parameters(), lr=1e-3),
    }
    bce = nn.functional.binary_cross_entropy_with_logits
    for turn in (1, 2, 3):
        rows = noise(4, 6, 3, 3, seed=20 + turn)
        state = attack.watch(state, rows, labels=None, part=part)
        places = slow.draws.places(4)
        images, labels = slow.draws.images[places], torch.arange(12)[places] % CLASSES
        with scoped(derive(slow.stream, f"step/{turn}")):
            made = slow.simulator(images)
            loss = nn.functional.cross_entropy(part(made), labels)
            loss = loss + 0.2 * bce(slow.critic(made), torch.ones(4, 1))
            loss = loss + 0.8 * kernel_distance(made, rows)
            adams["e"].zero_grad()
            loss.backward()
            adams["e"].step()
            real, fake = slow.critic(rows), slow.critic(made.detach())
            adams["c"].zero_grad()
            (bce(real, torch.ones(4, 1)) + bce(fake, torch.zeros(4, 1))).backward()
            adams["c"].step()
            decoded = slow.decoder(slow.simulator(images).detach())
            adams["d"].zero_grad()
            (decoded - images.flatten(1)).square().mean().backward()
            adams["d"].step()
    for name in ("simulator", "critic", "decoder"):
        one, other = getattr(state, name).state_dict(), getattr(slow, name).state_dict()
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-6)
    assert set(state.losses) == {"task", "critic", "mmd", "critic_own", "decoder"}


def test_live_and_from_a_trace_it_takes_the_same_steps() -> None:
    shown = view()
    attack = Bare(**ALL)
    replayed = attack.run(shown, seed=3)
    state = attack.begin(replace(shown, smashed_shape=(6, 3, 3), rows=4), seed=3)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(derive(3, "order")))
    assert shown.smashed is not None
    halves = list(order.split(4))
    generator = torch.Generator().manual_seed(derive(3, "order"))
    torch.randperm(ROWS, generator=generator)
    halves.append(torch.randperm(ROWS, generator=generator)[:4])
    for places in halves:
        state = attack.watch(state, shown.smashed[places], labels=None, part=shown.server_part)
    assert isinstance(attack, Watcher)
    live = attack.guess(state, shown.smashed)
    assert live.images is not None
    assert replayed.images is not None
    assert torch.equal(live.images, replayed.images)


def test_neither_the_view_nor_the_servers_part_is_changed() -> None:
    shown = view()
    assert shown.server_part is not None
    before = copy.deepcopy(shown.server_part.state_dict())
    Bare(**ALL, moments_within=True).run(shown, seed=0)
    after = shown.server_part.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not shown.server_part.training
    assert all(each.grad is None for each in shown.server_part.parameters())


def test_a_row_that_is_not_finite_fails_alone() -> None:
    shown = view()
    assert shown.smashed is not None
    broken = shown.smashed.clone()
    broken[2] = torch.nan
    guess = Bare(**ALL).run(replace(shown, smashed=broken, round_smashed=broken), seed=0)
    assert guess.failed is not None
    assert guess.failed.tolist() == [row == 2 for row in range(ROWS)]
    assert guess.images is not None
    assert guess.images[~guess.failed].isfinite().all()
    lost = torch.full_like(broken, torch.nan)
    with pytest.raises(UnfitViewError, match="none of the round's smashed rows is finite"):
        Bare().run(replace(shown, round_smashed=lost), seed=0)


def test_a_u_shape_is_read_through_a_head_of_its_own() -> None:
    assert Bare(task=1.0).run(view(), seed=0).labels is None
    guess = Bare(task=1.0, label_flip=0.2).run(view(upper=5), seed=0)
    assert guess.labels is not None
    assert guess.labels.shape == (ROWS, 1)
    assert Bare(mmd=1.0).run(view(upper=5), seed=0).labels is None


def test_flipped_labels_are_as_many_as_asked_for() -> None:
    attack = Bare(task=1.0, label_flip=0.3)
    shown = view(upper=5, smashed_shape=(6, 3, 3), rows=4)
    state = attack.begin(shown, seed=0)
    places = torch.zeros(3000, dtype=torch.long)
    drawn = attack._labels(state, places, torch.zeros(1, CLASSES))
    assert float((drawn != 0).float().mean()) == pytest.approx(0.3 * 2 / 3, abs=0.03)
    vanilla = attack.begin(view(smashed_shape=(6, 3, 3), rows=4), seed=0)
    assert (attack._labels(vanilla, places, torch.zeros(1, CLASSES)) == 0).all()


def test_aligned_images_have_the_labels_of_the_batch() -> None:
    attack = Bare(task=1.0, aligned=True)
    state = attack.begin(view(smashed_shape=(6, 3, 3), rows=4), seed=0)
    labels = torch.tensor([2, 2, 0, 1])
    places = attack._places(state, labels)
    assert places is not None
    assert (places % CLASSES).tolist() == labels.tolist()
    with pytest.raises(MissingKnowledgeError, match="which this node does not send"):
        attack.run(view(round_labels=None), seed=0)


def test_batches_before_it_starts_pass_by() -> None:
    attack = Bare(mmd=1.0, starts=2)
    opening = view(smashed_shape=(6, 3, 3), rows=4)
    state = attack.begin(opening, seed=0)
    first = copy.deepcopy(state.simulator.state_dict())
    for turn in range(3):
        state = attack.watch(state, noise(4, 6, 3, 3, seed=turn), labels=None, part=None)
        moved = any(not torch.equal(first[k], v) for k, v in state.simulator.state_dict().items())
        assert moved == (turn == 2)


def test_a_pilot_needs_no_architecture_and_ends_as_the_rows_do() -> None:
    attack = Bare(mmd=1.0, simulator="pilot")
    shown = view(architecture=None, server_part=None, public_labels=None)
    assert attack.threat.needs == {Knowledge.PUBLIC_IMAGES}
    assert attack.run(shown, seed=0).images is not None
    opening = replace(shown, smashed_shape=(6, 3, 3), rows=4)
    for rows, rectified in ((noise(4, 6, 3, 3, seed=0), True), (-noise(4, 6, 3, 3, seed=0), False)):
        state = attack.watch(attack.begin(opening, seed=0), rows, labels=None, part=None)
        assert state.rectified is rectified
    flat = noise(ROWS, 7, seed=0)
    with pytest.raises(UnfitViewError, match='or set simulator = "architecture"'):
        attack.run(replace(shown, smashed=flat, round_smashed=flat), seed=0)


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, {"architecture"}),
        ({"task": 1.0}, {"architecture", "public-labels", "server-part"}),
        ({"prior": 1.0}, {"architecture", "server-part"}),
        ({"moments": 1.0}, {"architecture"}),
        ({"moments": 1.0, "moments_within": True}, {"architecture", "server-part"}),
        ({"aligned": True}, {"architecture", "public-labels"}),
    ],
)
def test_a_term_needs_what_it_reads(settings: dict[str, Any], needs: set[str]) -> None:
    threat = Bare(**settings).threat
    assert {str(need) for need in threat.needs} == needs | {"public-images"}
    assert threat.seat == Seat.SERVER
    assert not threat.active


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"simulator": "twin"}, "simulator 'twin'"),
        ({"prior_by": "l2"}, "prior_by 'l2'"),
        ({"mmd": -0.1}, "mmd is -0.1; it must be 0 or more"),
        ({"task": float("nan")}, "task is nan; it must be 0 or more"),
        ({"steps": 0}, "steps is 0; it must be 1 or more"),
        ({"rate": 0.0}, "rate is 0.0; it must be positive"),
        ({"label_flip": 1.0}, r"label_flip is 1.0; it must be in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bare(**settings)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"round_smashed": None}, MissingKnowledgeError, "must hold smashed and round_smashed"),
        ({"architecture": None}, MissingKnowledgeError, "simulates the node's own layers"),
        ({"public_images": None}, MissingKnowledgeError, "adversary's own images"),
        ({"public_labels": None}, MissingKnowledgeError, "labels of its own images"),
        ({"server_part": None}, MissingKnowledgeError, "through the server's own part"),
        ({"public_images": noise(9, 3, 6, 6, seed=0)}, UnfitViewError, "public images have shape"),
    ],
)
def test_a_view_that_lacks_something_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Bare(**ALL).run(view(**changes), seed=0)


def test_images_of_its_own_that_fit_no_run_are_refused_before_training() -> None:
    opening = {"smashed": None, "round_smashed": None, "smashed_shape": (6, 3, 3), "rows": 4}
    Bare(**ALL).check(view(**opening))
    for images, told in (
        (noise(3, *SHAPE, seed=0), "3 public"),
        (noise(9, 3, 6, 6, seed=0), "sha"),
    ):
        with pytest.raises(UnfitViewError, match=told):
            Bare(**ALL).check(view(**opening, public_images=images, public_labels=None))


def test_labels_that_no_node_sends_are_refused_before_training() -> None:
    opening = {"smashed": None, "round_smashed": None, "smashed_shape": (6, 3, 3), "rows": 4}
    attack = Bare(aligned=True)
    attack.check(view(**opening, round_labels=torch.empty(0, dtype=torch.long)))
    for labels in (None, torch.arange(12) % 2):
        with pytest.raises(MissingKnowledgeError, match="set aligned = false, or use"):
            attack.check(view(**opening, round_labels=None, public_labels=labels))


def test_on_a_trace_its_own_images_bound_the_batch_which_beside_a_training_they_must_fill() -> None:
    scarce = {"public_images": noise(3, *SHAPE, seed=0), "public_labels": torch.arange(3) % 2}
    few, fewer = (
        Bare(mmd=1.0, batch_rows=rows).run(view(**scarce), seed=0).images for rows in (3, 40)
    )
    assert few is not None
    assert fewer is not None
    assert torch.equal(few, fewer)
    with pytest.raises(UnfitViewError, match="3 public images cannot fill"):
        Bare(**ALL).begin(view(**scarce, smashed_shape=(6, 3, 3), rows=4), seed=0)


def test_before_training_it_asks_for_the_shape() -> None:
    with pytest.raises(MissingKnowledgeError, match="set smashed_shape"):
        Bare().begin(view(), seed=0)
