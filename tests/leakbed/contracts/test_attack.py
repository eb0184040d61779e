import dataclasses
import subprocess
import sys

import pytest
import torch

from leakbed.contracts import (
    IN_WORDS,
    Attack,
    Defense,
    DefenseState,
    Evidence,
    Guess,
    Knowledge,
    Seat,
    ThreatModel,
    View,
)
from leakbed.seeds import derive, generator


def test_a_threat_model_says_itself_in_words() -> None:
    threat = ThreatModel(
        seat=Seat.SERVER,
        evidence=frozenset({Evidence.SMASHED, Evidence.CUT_GRADIENT}),
        needs=frozenset({Knowledge.ARCHITECTURE}),
    )
    assert threat.in_words() == (
        "The server follows the protocol, reads the gradient returned at the cut, the activations "
        "a node sends at the cut, and knows the layers of the part it does not hold (not their "
        "weights)."
    )
    active = dataclasses.replace(threat, active=True, needs=frozenset())
    assert active.in_words().startswith("The server rewrites messages, reads")
    assert active.in_words().endswith("and knows nothing else.")


def test_every_kind_of_evidence_and_knowledge_has_words() -> None:
    assert set(IN_WORDS) == {*Evidence, *Knowledge}


def test_threat_models_are_values_and_views_are_not() -> None:
    one, two = (ThreatModel(seat=Seat.CLIENT, evidence=frozenset()) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    views = [View(seat=Seat.SERVER, image_shape=(1, 2, 2), num_classes=2, targets=1)] * 1
    assert views[0] != dataclasses.replace(views[0])  # tensors have no truth value


def test_what_is_not_granted_is_none() -> None:
    view = View(seat=Seat.SERVER, image_shape=(1, 2, 2), num_classes=2, targets=3)
    given = {"seat", "image_shape", "num_classes", "targets", "rows", "local_steps", "granted"}
    assert all(vars(view)[name] is None for name in vars(view).keys() - given)
    assert len(view.granted) == 0
    assert (view.rows, view.local_steps) == (1, 1)
    assert all(value is None for value in vars(Guess()).values())


@pytest.mark.parametrize("value", [Guess(), DefenseState(stream=1)])
def test_contracts_cannot_be_changed_in_place(value: object) -> None:
    name = dataclasses.fields(value)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, 3)


def test_an_attack_is_whatever_has_its_parts() -> None:
    class Nothing:
        name, source = "nothing", "nowhere"
        threat = ThreatModel(seat=Seat.SERVER, evidence=frozenset())

        def run(self, view: View, *, seed: int) -> Guess:
            return Guess()

    assert isinstance(Nothing(), Attack)
    assert not isinstance(object(), Attack)


def test_a_defense_changes_nothing_until_overridden() -> None:
    defense = Defense()
    state = defense.begin(7)
    assert (state.stream, state.messages, dict(state.tensors)) == (7, 0, {})
    tensor = torch.ones(2, 3)
    assert defense.protect_smashed(state, tensor) == (state, tensor)
    assert defense.protect_cut_gradient(state, tensor) == (state, tensor)
    after = {"w": tensor}
    kept, sent = defense.protect_update(state, {"w": torch.zeros(2, 3)}, after)
    assert kept is state
    assert sent is after


def test_the_state_counts_messages_and_draws_each_ones_noise_from_the_stream() -> None:
    first = DefenseState(stream=7)
    second = first.next()
    assert (first.messages, second.messages) == (0, 1)
    assert second.stream == 7
    draws = [torch.randn(4, generator=state.generator()) for state in (first, second, first)]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[1], torch.randn(4, generator=generator(derive(7, "message/1"))))


LIGHT = ["contracts", "events", "mods", "seeds", "tap.trace", "wire.messages", "tap.wiretap"]


def test_what_strangers_import_needs_neither_torch_nor_ray() -> None:
    program = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module("leakbed." + name)
from leakbed.tap.wiretap import Wiretap
heavy = {{"torch", "torchvision", "ray", "jaxtyping", "pydantic", "mlxtend", "scipy", "sklearn"}}
print(sorted(heavy & set(sys.modules)))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == "[]"
