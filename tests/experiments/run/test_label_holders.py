"""Whoever holds labels is trained again: each recorded gradient is made again from true labels."""

from pathlib import Path
from typing import Any

import pytest

from experiments.run import label_ceilings
from experiments.run.label_ceilings import label_ceiling_of_run
from experiments.run.runner import run
from leakbed.contracts.noise_laws import NoCeilingError
from tests.support.canaries import FEDAVG, PLAIN, SMALL, STRIPS, U_SHAPED, only, splitfed


@pytest.mark.parametrize(
    ("changes", "seat", "read"),
    [
        (splitfed("splitfed-v1", optimizer_state="kept"), "client", 8),
        (splitfed("splitfed-v2"), "client", 8),
        (splitfed("parallel-split", sync="step", gradient_scale="local"), "client", 8),
        (STRIPS, "party that is sent them", 1),
        (U_SHAPED, "server", 9),
        (FEDAVG, "server", 2),
    ],
)
def test_who_holds_labels_is_trained_again_in_every_protocol(
    changes: dict[str, Any], seat: str, read: int, tmp_path: Path
) -> None:
    """Messages without noise are refused unless each is, to rounding, what the truth sends."""
    run({**SMALL, **changes}, out=tmp_path)
    if changes is STRIPS:
        with pytest.raises(NoCeilingError, match=r"other parties' next rows .* span = 'message'"):
            label_ceiling_of_run(only(tmp_path), targets=1)
    span = "message" if changes is STRIPS else "training"
    found = label_ceiling_of_run(only(tmp_path), targets=1, span=span)
    assert (found.seat, found.value, found.cap) == (seat, pytest.approx(1.0), None)
    (canary,) = found.messages
    assert canary.hit == 1.0
    assert read - 1 <= canary.read <= read


def test_private_steps_are_repeated_and_a_later_gradient_has_no_density(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = [{"name": "dp-sgd", "rate": 0.25, "steps": 4}]
    run({**SMALL, "protocol": PLAIN, "defense": noise}, out=tmp_path)
    honest = label_ceilings._first_uses

    def later(*given: Any, **more: Any) -> list[Any]:
        return [target for target in honest(*given, **more) if (target.round, target.step) > (1, 0)]

    monkeypatch.setattr(label_ceilings, "_first_uses", later)
    found = label_ceiling_of_run(only(tmp_path), targets=2, span="message")
    assert found.value == pytest.approx(1.0)  # dp-sgd leaves the gradient itself as it is
    assert {each.step for each in found.messages} == {1}
    assert {each.hit for each in found.messages} == {1.0}
    with pytest.raises(NoCeilingError, match="dp-sgd noises the top's weights"):
        label_ceiling_of_run(only(tmp_path))
