from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.baselines import MeanImage
from attacks.feature_space_hijacking import SMALL, FeatureSpaceHijacking
from experiments.run.server_part import Mirror
from leakbed.contracts import Guess, View
from leakbed.events import (
    CutGradientDown,
    Event,
    Phase,
    SmashedUp,
    arrays_of,
    scalars_of,
)
from leakbed.hijack import Hijack, HijackError, Rehearsal, Watch, rehearse
from leakbed.seeds import derive
from leakbed.tap.wiretap import Wiretap
from strategies.server_model import TopTrainer
from strategies.vanilla_split import VanillaSplit
from tests.support import hijackable, tiny
from tests.support.adversaries import Doubling, Echo, Looking

PLAN = tiny.plan(optimizer="adam", learning_rate=1e-3)
FSHA = FeatureSpaceHijacking(**SMALL)  # type: ignore[arg-type]  a table of settings
ROUNDS, SEED = 2, 3


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    torch.set_num_threads(1)
    with tiny.identity():
        yield


def smashed(step: int = 0, *, value: float = 0, **changes: Any) -> SmashedUp:
    sent = np.full((8, *hijackable.SMASHED), value, np.float32)
    return SmashedUp(**{"node": 1, "round": 1, "step": step, "smashed": sent} | changes)


def gradient(step: int = 0, **changes: Any) -> CutGradientDown:
    sent = np.ones((8, *hijackable.SMASHED), np.float32)
    return CutGradientDown(**{"node": 1, "round": 1, "step": step, "gradient": sent} | changes)


@dataclass(frozen=True, kw_only=True)
class Notes(Echo):
    """Returns the first number of the smashed batch as its gradient."""

    name: ClassVar[str] = "notes"

    def forge(self, state: Any, smashed: Tensor, cut_gradient: Tensor) -> tuple[Any, Tensor]:
        return state, smashed.flatten()[0] * torch.ones_like(cut_gradient)


@dataclass(frozen=True, kw_only=True)
class Broken(Echo):
    """Returns what cannot be sent."""

    name: ClassVar[str] = "broken"
    kind: str = "shape"

    def forge(self, state: Any, smashed: Tensor, cut_gradient: Tensor) -> tuple[Any, Tensor]:
        made = {
            "shape": cut_gradient[:1],
            "type": cut_gradient.double(),
            "number": cut_gradient * torch.nan,
        }
        return state, made[self.kind]


def test_a_gradient_is_paired_with_the_batch_of_its_node_round_and_step() -> None:
    hijack = Hijack(Notes(), hijackable.view(), seed=0)
    places = [{"step": 4}, {"step": 5}, {"step": 4, "node": 2}, {"step": 4, "round": 2}]
    for value, place in enumerate(places):
        assert hijack(smashed(value=value, **place)) is None
    for value in (1, 3, 0):
        sent = gradient(**places[value])
        forged = hijack(sent)
        assert isinstance(forged, CutGradientDown)
        assert (forged.gradient == value).all()
        assert (sent.gradient == 1).all()
    assert hijack.iteration == 3


def test_batches_of_evaluation_pass_by() -> None:
    hijack = Hijack(Echo(), hijackable.view(), seed=0)
    assert hijack(smashed(phase=Phase.EVALUATE)) is None
    with pytest.raises(HijackError, match="none came"):
        hijack(gradient())


def test_a_gradient_without_its_batch_stops_the_run() -> None:
    hijack = Hijack(Echo(), hijackable.view(), seed=0)
    hijack(smashed(0))
    with pytest.raises(HijackError, match=r"node 1 for round 1, step 1, .* none came"):
        hijack(gradient(1))
    with pytest.raises(HijackError, match=r"one of \(8, 4, 3, 3\) came"):
        hijack(gradient(0, gradient=np.ones((2, 4), np.float32)))


@pytest.mark.parametrize(
    ("kind", "message"), [("shape", "gradient of"), ("type", "float64"), ("number", "finite")]
)
def test_a_forgery_that_cannot_be_sent_stops_the_run(kind: str, message: str) -> None:
    hijack = Hijack(Broken(kind=kind), hijackable.view(), seed=0)
    hijack(smashed())
    with pytest.raises(HijackError, match=message):
        hijack(gradient())


def test_a_passive_attack_hijacks_nothing() -> None:
    with pytest.raises(HijackError, match="rewrites nothing"):
        Hijack(MeanImage(), hijackable.view(), seed=0)  # type: ignore[arg-type]


def test_the_process_generator_stays_where_it_was() -> None:
    before = torch.get_rng_state()
    hijack = Hijack(Echo(), hijackable.view(), seed=0)
    hijack(smashed())
    hijack(gradient())
    hijack.guess(torch.ones(2, 4))
    assert torch.equal(torch.get_rng_state(), before)


def run(
    adversary: Any, *, resident: bool = True
) -> tuple[dict[str, Tensor], list[Event], Hijack[Any] | None]:
    """Train through LocalGrid; return all weights, what crossed the wire, and the hijack."""
    architecture = hijackable.architecture()
    grid = tiny.ready(resident=resident, architecture=architecture, plan=PLAN)
    parts = architecture.parts(derive(tiny.SEED, "victim-init"))
    trainer = TopTrainer(parts.top, PLAN.optimiser(parts.top.parameters()))
    bottom = {name: value.numpy() for name, value in parts.bottom.state_dict().items()}
    seen: list[Event] = []
    hijack = Hijack(adversary, hijackable.view(), seed=SEED) if adversary else None
    tap = Wiretap(grid, [seen.append], active=hijack, strict=True)
    trained = tiny.train_split(tap, VanillaSplit(trainer, bottom), rounds=ROUNDS)
    return trained, seen, hijack


def rehearsed(adversary: Any, **changes: Any) -> Rehearsal[Any]:
    cell = hijackable.cell(plan=PLAN)
    images, _ = cell.rows()
    steps = [
        (rows, derive(cell.stream, f"forward/{round_}/{step}"))
        for round_ in range(1, ROUNDS + 1)
        for step, rows in enumerate(cell.batches(round_, len(images)))
    ]
    settings: dict[str, Any] = {
        "view": hijackable.view(),
        "seed": SEED,
        "optimiser": PLAN.optimiser,
        "forward_stream": lambda step: steps[step][1],
    }
    bottom = hijackable.architecture().bottom(derive(tiny.SEED, "victim-init"))
    return rehearse(bottom, adversary, [images[rows] for rows, _ in steps], **settings | changes)


@pytest.mark.parametrize("resident", [True, False])
def test_a_rehearsal_ends_in_the_bits_of_the_run(resident: bool) -> None:
    trained, _, hijack = run(FSHA, resident=resident)
    rehearsal = rehearsed(FSHA)
    bottom = rehearsal.bottom.state_dict()
    assert tiny.same(bottom, {name: trained[name] for name in bottom})
    assert hijack is not None
    assert hijack.iteration == rehearsal.hijack.iteration == ROUNDS * (PLAN.local_steps or 0)
    for part in ("pilot", "decoder"):
        one, other = (getattr(each.state, part) for each in (hijack, rehearsal.hijack))
        assert tiny.same(one.state_dict(), other.state_dict())
    first = hijackable.architecture().bottom(derive(tiny.SEED, "victim-init")).state_dict()
    assert not tiny.same(bottom, first)


def test_a_rehearsal_neither_changes_its_bottom_nor_the_generators() -> None:
    bottom = hijackable.architecture().bottom(1)
    before = {name: value.clone() for name, value in bottom.state_dict().items()}
    rehearse(
        bottom,
        FSHA,
        [torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))],
        view=hijackable.view(),
        seed=0,
        optimiser=PLAN.optimiser,
    )
    assert tiny.same(before, bottom.state_dict())


def test_a_rehearsal_with_an_honest_server_and_an_echo_is_plain_training() -> None:
    """Split at the cut and joined again by hand, beside torch's own backward pass."""
    images = torch.rand(3, 8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    bottom = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    seen: list[int] = []
    rehearsal = rehearse(
        bottom,
        Echo(),
        images,
        view=hijackable.view(),
        seed=0,
        optimiser=PLAN.optimiser,
        honest=lambda _, smashed: 2 * smashed,  # of the loss: the sum of squares
        watch=lambda step, part, hijack: seen.append(hijack.iteration + part.training),
    )
    adam = PLAN.optimiser(bottom.parameters())
    for batch in images:
        adam.zero_grad()
        bottom(batch).square().sum().backward()
        adam.step()
    assert tiny.same(rehearsal.bottom.state_dict(), bottom.state_dict())
    assert seen == [2, 3, 4]


def test_a_forge_that_returns_what_it_was_given_leaves_every_bit() -> None:
    honest, plain, _ = run(None)
    trained, seen, hijack = run(Echo())
    assert tiny.same(trained, honest)
    assert hijack is not None
    assert hijack.iteration == 6
    assert len(seen) == len(plain)
    assert all(_equal(one, other) for one, other in zip(seen, plain, strict=True))


@pytest.mark.parametrize("adversary", [FSHA, Doubling()], ids=["fsha", "doubling"])
def test_a_hijacked_run_looks_like_an_honest_one(adversary: Any) -> None:
    """Equal up to the first forged gradient; then in all but the numbers."""
    (_, plain), (trained, seen) = run(None)[:2], run(adversary)[:2]
    first = next(i for i, event in enumerate(seen) if isinstance(event, CutGradientDown))
    assert isinstance(seen[first - 1], SmashedUp)
    assert all(_equal(a, b) for a, b in zip(seen[:first], plain[:first], strict=True))
    assert not _equal(seen[first], plain[first])
    assert [_outline(event) for event in seen] == [_outline(event) for event in plain]
    assert not any(
        _equal(a, b)
        for a, b in zip(seen[first:], plain[first:], strict=True)
        if isinstance(a, SmashedUp)
    )
    assert all(value.isfinite().all() for value in trained.values())


def _outline(event: Event) -> Any:
    arrays = {
        (field, name): (array.shape, array.dtype)
        for field, own in arrays_of(event).items()
        for name, array in own.items()
    }
    return type(event), scalars_of(event), arrays


def _equal(one: Event, other: Event) -> bool:
    mine, others = arrays_of(one), arrays_of(other)
    return _outline(one) == _outline(other) and all(
        np.array_equal(array, others[field][name])
        for field, own in mine.items()
        for name, array in own.items()
    )


def test_a_guess_leaves_the_hijack_as_it_is() -> None:
    def trained(*, guessing: bool) -> dict[str, Tensor]:
        def watch(step: int, bottom: nn.Module, hijack: Hijack[Any]) -> None:
            if guessing:
                assert isinstance(hijack.guess(torch.ones(3, *hijackable.SMASHED)), Guess)

        rehearsal = rehearsed(FSHA, watch=watch)
        return rehearsal.bottom.state_dict() | rehearsal.hijack.state.decoder.state_dict()

    assert tiny.same(trained(guessing=True), trained(guessing=False))


def test_begin_meets_the_view_it_was_granted() -> None:
    met: list[View] = []

    class Curious(Echo):
        def begin(self, view: View, *, seed: int) -> Any:
            met.append(view)
            return super().begin(view, seed=seed)

    granted = replace(hijackable.view(), rows=5)
    Hijack(Curious(), granted, seed=0)
    assert met == [granted]


@dataclass(frozen=True, kw_only=True)
class Careless(Echo):
    """Draws everything from the global generator."""

    name: ClassVar[str] = "careless"

    def begin(self, view: View, *, seed: int) -> Any:
        return torch.rand(1)

    def forge(self, state: Any, smashed: Tensor, cut_gradient: Tensor) -> tuple[Any, Tensor]:
        return state, state * torch.rand(cut_gradient.shape)

    def guess(self, state: Any, smashed: Tensor) -> Guess:
        return Guess(images=torch.rand(len(smashed), 1, 1, 6, 6))


def test_an_adversary_that_draws_from_the_global_generators_is_the_same_again() -> None:
    def forged(*, ambient: int, seed: int = SEED) -> list[Tensor]:
        torch.manual_seed(ambient)
        hijack = Hijack(Careless(), hijackable.view(), seed=seed)
        batch = torch.zeros(2, *hijackable.SMASHED)
        found = [hijack.forge(batch, torch.ones_like(batch)) for _ in range(2)]
        guessed = [hijack.guess(batch).images for _ in range(2)]
        return [*found, *(image for image in guessed if image is not None)]

    once, again, other = forged(ambient=1), forged(ambient=2), forged(ambient=1, seed=SEED + 1)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], other[0])
    assert not torch.equal(once[0], once[1])
    assert torch.equal(once[2], once[3])  # asked again of the same state, it guesses the same


def watched(watcher: Any) -> tuple[dict[str, Tensor], list[Event], Watch[Any], list[Any]]:
    """Train as `run` does, with a watcher among the hooks; return also each step's weights."""
    architecture = hijackable.architecture()
    grid = tiny.ready(architecture=architecture, plan=PLAN)
    parts = architecture.parts(derive(tiny.SEED, "victim-init"))
    trainer = TopTrainer(parts.top, PLAN.optimiser(parts.top.parameters()))
    bottom = {name: value.numpy() for name, value in parts.bottom.state_dict().items()}
    seen: list[Event] = []
    mirror = Mirror(architecture, lambda _: trainer.module, device=torch.device("cpu"))
    watch = Watch(watcher, hijackable.view(), seed=SEED, part=mirror)
    tap = Wiretap(grid, [seen.append, watch], strict=True)
    trained = tiny.train_split(tap, VanillaSplit(trainer, bottom), rounds=ROUNDS)
    return trained, seen, watch, list(trainer.module.state_dict().items())


def test_a_run_has_the_same_bits_with_and_without_a_watcher() -> None:
    """Even one that overwrites all it is shown and draws from every global generator."""
    honest, plain, _ = run(None)
    trained, seen, watch, _ = watched(Looking(meddles=True))
    assert tiny.same(trained, honest)
    assert watch.iteration == ROUNDS * (PLAN.local_steps or 0)
    assert len(seen) == len(plain)
    assert all(_equal(one, other) for one, other in zip(seen, plain, strict=True))


def test_a_watcher_sees_each_batch_with_its_labels_and_the_part_after_its_step() -> None:
    _, seen, watch, last = watched(Looking())
    sent = [e for e in seen if isinstance(e, SmashedUp) and e.phase == Phase.TRAIN]
    assert len(watch.state) == len(sent) == ROUNDS * (PLAN.local_steps or 0)
    for event, (smashed_, labels, part, _) in zip(sent, watch.state, strict=True):
        assert np.array_equal(event.smashed, smashed_)
        assert event.labels is not None
        assert labels.tolist() == list(event.labels)
        assert part.keys() == dict(last).keys()
    parts = [part for _, _, part, _ in watch.state]
    assert all(torch.equal(parts[-1][name], value) for name, value in last)
    assert not tiny.same(parts[0], parts[1])
    assert all(frozen for *_, frozen in watch.state)


def test_what_is_not_named_is_not_shown() -> None:
    _, _, watch, _ = watched(Looking(reads_part=False))
    assert {part for _, _, part, _ in watch.state} == {None}


def test_a_watch_that_lacks_the_part_or_has_an_active_adversary_is_refused() -> None:
    watch = Watch(Looking(), hijackable.view(), seed=0)
    watch(smashed())
    with pytest.raises(HijackError, match="looking reads the server's part as it is trained"):
        watch(gradient())
    with pytest.raises(HijackError, match="says that it rewrites messages"):
        Watch(Echo(), hijackable.view(), seed=0)  # type: ignore[arg-type]
    with pytest.raises(HijackError, match="none came"):
        Watch(Looking(), hijackable.view(), seed=0)(gradient())
