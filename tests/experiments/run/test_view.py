"""Views grant what a threat model names, and nothing else."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from experiments.run.server_part import layers
from experiments.run.targets import Evidences, MisfitError, left_out, pick_targets
from experiments.run.view import architecture_of, build_view
from leakbed.contracts import Evidence, Knowledge, Seat, ThreatModel
from leakbed.events import CutGradientDown, UpdateUp
from leakbed.tap.segments import TraceError
from leakbed.tap.trace import Recorder, Trace
from tests.support import tiny
from tests.support.small_traces import (
    ABOUT,
    CPU,
    SMASHED,
    UPDATE,
    Make,
    make_trace,
    smashed,
    update,
)

CLIENT = ThreatModel(
    seat=Seat.CLIENT, evidence=frozenset({Evidence.SMASHED, Evidence.CUT_GRADIENT})
)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(make_trace, tmp_path / "trace")


def test_first_rows_of_all_nodes_come_first(make: Make) -> None:
    trace = make([smashed(1, 0), smashed(1, 1), smashed(0, 0), smashed(0, 1)])
    targets = pick_targets(Evidences.of(trace), SMASHED, when="training", count=6)
    assert [(t.node, t.step, t.row) for t in targets] == [
        (0, 0, 0),
        (1, 0, 0),
        (0, 0, 1),
        (1, 0, 1),
        (0, 1, 0),
        (1, 1, 0),
    ]
    view = build_view(trace, Evidences.of(trace), SMASHED, targets, device=CPU)
    assert view.smashed is not None
    assert view.smashed[:, 0].tolist() == [0, 100, 1, 101, 10, 110]
    assert view.labels is not None, "this protocol shares them"


def test_nothing_is_granted_that_is_not_named(make: Make) -> None:
    trace = make([smashed(0, 0)])
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, SMASHED, when="training", count=2)
    view = build_view(trace, evidences, SMASHED, targets, device=CPU)
    for field in ("before", "after", "cut_gradient", "architecture", "public_images"):
        assert getattr(view, field) is None, field
    needs = frozenset({Knowledge.ARCHITECTURE, Knowledge.PUBLIC_IMAGES})
    greedy = ThreatModel(seat=Seat.SERVER, evidence=SMASHED.evidence, needs=needs)
    granted = build_view(trace, evidences, greedy, targets, device=CPU)
    assert granted.architecture is not None
    assert granted.public_images is not None


def test_gradients_are_those_of_the_same_rows(make: Make) -> None:
    gradient = CutGradientDown(
        node=0, round=2, step=0, gradient=np.arange(64, dtype=np.float32).reshape(2, 32)
    )
    trace = make([replace(smashed(0, 0), labels=None), gradient])
    both = CLIENT
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, both, when="training", count=2)
    view = build_view(trace, evidences, both, targets, device=CPU)
    assert view.cut_gradient is not None
    assert view.cut_gradient[:, 0].tolist() == [0, 32]


def test_updates_are_stacked_with_their_own_start(make: Make) -> None:
    trace = make([update(0), update(1)])
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, UPDATE, when="training", count=8)
    view = build_view(trace, evidences, UPDATE, targets, device=CPU)
    assert view.before is not None
    assert view.after is not None
    assert view.before["0.bias"][:, 0].tolist() == [0, 1]
    assert view.after["0.bias"][:, 0].tolist() == [1, 2]
    assert (view.targets, view.rows) == (2, 1)


def test_a_loss_and_a_number_of_samples_that_are_sent_can_be_read(make: Make) -> None:
    told = [replace(update(0), train_loss=0.1), replace(update(1), train_loss=2.5)]
    trace = make(told)
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, UPDATE, when="training", count=8)
    view = build_view(trace, evidences, UPDATE, targets, device=CPU)
    assert view.train_loss is not None
    assert view.num_examples is not None
    assert view.train_loss.tolist() == [0.1, 2.5]
    assert view.num_examples.tolist() == [1, 1]
    silent = replace(evidences, updates=[update(0), told[1]])
    assert build_view(trace, silent, UPDATE, targets, device=CPU).train_loss is None


def test_updates_over_different_numbers_of_samples_are_attacked_apart(make: Make) -> None:
    trace = make([update(0, examples=3), update(1, examples=4), update(2, examples=4)])
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, UPDATE, when="training", count=8)
    view = build_view(trace, evidences, UPDATE, targets, device=CPU)
    assert [target.node for target in targets] == [1, 2]
    assert view.rows == 4
    note = left_out(evidences, targets)
    assert note is not None
    assert "updates over 4 were attacked, others (1 over 3) were not" in note
    assert left_out(evidences, [replace(targets[0], node=node) for node in range(3)]) is None
    together = [replace(targets[0], node=0), *targets]
    with pytest.raises(MisfitError, match=r"different numbers of samples \(\['3', '4'\]\)"):
        build_view(trace, evidences, UPDATE, together, device=CPU)


@pytest.mark.parametrize("only_trained", [False, True])
def test_numbered_arrays_are_read_in_the_order_of_the_models_own(
    make: Make, only_trained: bool
) -> None:
    """As Flower's older clients send them: all of the state_dict, or the parameters alone."""
    network = tiny.architecture("stateful").build(0)
    named = dict(network.named_parameters()) if only_trained else network.state_dict()
    numbered = {str(n): v.detach().numpy() for n, v in enumerate(named.values())}
    event = UpdateUp(node=0, round=1, before=numbered, after=numbered, examples=1)
    said = {"name": "tests.support.tiny:stateful", **STRANGE, "cut": 3}
    trace = make([event], architecture=said)
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, UPDATE, when="training", count=1)
    view = build_view(trace, evidences, UPDATE, targets, device=CPU)
    assert view.before is not None
    for name, parameter in network.named_parameters():
        assert torch.equal(view.before[name][0], parameter.detach())


def test_numbered_arrays_of_another_model_are_refused(make: Make) -> None:
    numbered = {"0": np.zeros((3, 3), np.float32), "1": np.zeros(3, np.float32)}
    trace = make([UpdateUp(node=0, round=1, before=numbered, after=numbered, examples=1)])
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, UPDATE, when="training", count=1)
    with pytest.raises(MisfitError, match=r"it has 0, 1; send weights under the names"):
        build_view(trace, evidences, UPDATE, targets, device=CPU)


def test_labels_are_given_only_where_declared(make: Make) -> None:
    trace = make([update(0)])
    evidences = Evidences.of(trace)
    given = ThreatModel(
        seat=Seat.SERVER, evidence=UPDATE.evidence, needs=frozenset({Knowledge.LABELS})
    )
    targets = pick_targets(evidences, given, when="training", count=1)
    with pytest.raises(MisfitError, match="answer key"):
        build_view(trace, evidences, given, targets, device=CPU)
    labels = torch.tensor([[2]])
    view = build_view(trace, evidences, given, targets, device=CPU, labels=labels)
    assert view.labels is not None
    assert build_view(trace, evidences, UPDATE, targets, device=CPU, labels=labels).labels is None


def test_an_update_over_one_sample_gives_its_heads_gradient_and_features_away(make: Make) -> None:
    features, error = np.arange(1, 33, dtype=np.float32), np.array([0.2, -0.7, 0.5], np.float32)
    moved = {"2.weight": 0.1 * np.outer(error, features), "2.bias": 0.1 * error}
    start = update(0).before
    after = {name: value - moved.get(name, 0) for name, value in start.items()}
    event = UpdateUp(node=0, round=1, before=start, after=after, examples=1)
    head = ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.HEAD_WEIGHT_GRADIENT}))
    trace = make([event])
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, head, when="training", count=1)
    view = build_view(trace, evidences, head, targets, device=CPU)
    assert view.smashed is not None
    assert view.head_gradient is not None
    torch.testing.assert_close(view.smashed[0], torch.from_numpy(features), rtol=1e-3, atol=1e-3)
    expected = torch.from_numpy(np.outer(error, features))
    torch.testing.assert_close(view.head_gradient[0] / 0.1, expected, rtol=1e-3, atol=1e-3)


def test_a_heads_gradient_needs_one_sample_per_update(make: Make) -> None:
    head = ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.HEAD_WEIGHT_GRADIENT}))
    trace = make([update(0, examples=2)])
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, head, when="training", count=1)
    with pytest.raises(MisfitError, match="local_steps = 1"):
        build_view(trace, evidences, head, targets, device=CPU)


def test_a_server_does_not_read_the_gradient_it_made(make: Make) -> None:
    evidence = frozenset({Evidence.SMASHED, Evidence.CUT_GRADIENT})
    trace = make([smashed(0, 0)])
    evidences = Evidences.of(trace)
    server = ThreatModel(seat=Seat.SERVER, evidence=evidence)
    targets = pick_targets(evidences, server, when="training", count=1)
    with pytest.raises(MisfitError, match="seat = 'client'"):
        build_view(trace, evidences, server, targets, device=CPU)


def test_a_client_that_has_the_labels_has_nothing_to_attack(make: Make) -> None:
    trace = make([smashed(0, 0)])
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, CLIENT, when="training", count=1)
    with pytest.raises(MisfitError, match=r"protocol\.labels = 'server'"):
        build_view(trace, evidences, CLIENT, targets, device=CPU)


def test_a_client_that_keeps_the_labels_has_nothing_to_attack_either(make: Make) -> None:
    trace = make([smashed(0, 0)])
    trace.about["labels"] = "client"
    evidences = Evidences.of(trace)
    gradients = replace(CLIENT, evidence=frozenset({Evidence.CUT_GRADIENT}))
    targets = pick_targets(evidences, gradients, when="training", count=1)
    with pytest.raises(MisfitError, match="the client holds every label itself"):
        build_view(trace, evidences, gradients, targets, device=CPU)


@pytest.mark.parametrize("seat", [Seat.CLIENT, Seat.LABEL_PARTY, Seat.EAVESDROPPER])
def test_shared_labels_are_for_the_server_alone(make: Make, seat: Seat) -> None:
    trace = make([smashed(0, 0)])
    evidences = Evidences.of(trace)
    threat = ThreatModel(seat=seat, evidence=SMASHED.evidence)
    targets = pick_targets(evidences, threat, when="training", count=1)
    assert build_view(trace, evidences, threat, targets, device=CPU).labels is None


@pytest.mark.parametrize(("steps", "expected"), [(None, 3), (2, 2)])
def test_one_pass_is_as_many_steps_as_it_has_batches(
    tmp_path: Path, steps: int | None, expected: int
) -> None:
    said = {**ABOUT, "local_steps": steps, "batch_size": 4}
    with Recorder(tmp_path / "trace", about=said) as recorder:
        recorder(update(0, examples=9))
    trace = Trace(tmp_path / "trace")
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, UPDATE, when="training", count=1)
    view = build_view(trace, evidences, UPDATE, targets, device=CPU)
    assert (view.rows, view.local_steps) == (9, expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"fc.weight": np.zeros((3, 32), np.float32)}, "has no '0.weight'.*it has fc.weight"),
        ({**update(0).before, "2.bias": np.zeros(7, np.float32)}, r"'2.bias' .*\(7,\).*\(3,\)"),
    ],
)
def test_weights_of_another_model_are_refused(
    make: Make, weights: dict[str, NDArray[Any]], message: str
) -> None:
    event = UpdateUp(node=0, round=1, before=weights, after=weights, examples=1)
    trace = make([event])
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, UPDATE, when="training", count=1)
    with pytest.raises(MisfitError, match=message):
        build_view(trace, evidences, UPDATE, targets, device=CPU)


def test_public_images_nobody_gave_are_asked_for(tmp_path: Path) -> None:
    with Recorder(tmp_path / "trace", about=ABOUT) as recorder:
        recorder(update(0))
    trace = Trace(tmp_path / "trace")
    evidences = Evidences.of(trace)
    needs = frozenset({Knowledge.PUBLIC_IMAGES})
    threat = ThreatModel(seat=Seat.SERVER, evidence=UPDATE.evidence, needs=needs)
    targets = pick_targets(evidences, threat, when="training", count=1)
    with pytest.raises(MisfitError, match=r"data\.public.*recorder\.hold\('adversary', 'public'"):
        build_view(trace, evidences, threat, targets, device=CPU)


def test_a_trace_that_does_not_say_its_architecture_is_refused() -> None:
    with pytest.raises(TraceError, match="does not say architecture"):
        architecture_of({"local_steps": 1})


def test_of_a_feature_party_a_view_shows_its_strip(make: Make) -> None:
    bare = [replace(smashed(node, 0), labels=None) for node in (0, 1)]
    gradients = [
        CutGradientDown(node=node, round=2, step=0, gradient=np.full((2, 32), node, np.float32))
        for node in (0, 1)
    ]
    trace = make([*bare, *gradients], divides="features", nodes=2)
    evidences = Evidences.of(trace)
    needs = frozenset({Knowledge.ARCHITECTURE, Knowledge.PUBLIC_IMAGES})
    server = ThreatModel(seat=Seat.SERVER, evidence=SMASHED.evidence, needs=needs)
    targets = pick_targets(evidences, server, when="training", count=9)
    view = build_view(trace, evidences, server, targets, device=CPU)
    assert view.image_shape == (1, 4, 2)
    assert view.architecture is not None
    assert view.architecture.image_shape == (1, 4, 2)
    assert view.public_images is not None
    assert view.public_images.shape == (2, 1, 4, 2)
    client = build_view(trace, evidences, CLIENT, targets, device=CPU)
    assert client.cut_gradient is not None
    assert client.cut_gradient.tolist() == np.zeros((2, 32)).tolist()


@pytest.mark.parametrize("examples", [None, 0, -2])
def test_updates_that_do_not_say_their_samples_ask_the_app_for_them(
    make: Make, examples: int | None
) -> None:
    trace = make([replace(update(0), examples=examples), replace(update(1), examples=examples)])
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, UPDATE, when="training", count=8)
    with pytest.raises(MisfitError, match=r"no whole number above 0 as 'num-examples'") as caught:
        build_view(trace, evidences, UPDATE, targets, device=CPU)
    assert "local_steps" not in str(caught.value), "an app that is only tapped has no settings"


STRANGE = {"image_shape": [1, 6, 6], "num_classes": 3}


def trained_update(name: str, *, node: int = 0) -> UpdateUp:
    """A node's update of a network after one step of SGD."""
    model = architecture_of({"architecture": {"name": name, **STRANGE}}).build(node)
    before = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    steps = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(model(torch.rand(1, 1, 6, 6)), torch.tensor([1])).backward()
    steps.step()
    after = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    return UpdateUp(node=node, round=2, before=before, after=after, examples=1)


def test_weights_that_are_not_trained_are_known_and_no_evidence(make: Make) -> None:
    name = "tests.support.strange_networks:frozen_bottom"
    event = trained_update(name)
    trace = make([event], architecture={"name": name, **STRANGE})
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, UPDATE, when="training", count=1)
    view = build_view(trace, evidences, UPDATE, targets, device=CPU)
    assert view.before is not None
    assert view.after is not None
    assert view.buffers is not None
    assert set(view.before) == set(view.after) == {"3.weight", "3.bias"}
    assert set(view.buffers) == {"0.weight", "0.bias"}
    assert torch.equal(view.buffers["0.weight"], torch.from_numpy(event.before["0.weight"]))


def test_an_update_of_a_network_without_trained_weights_is_no_evidence(make: Make) -> None:
    name = "tests.support.strange_networks:frozen"
    event = trained_update("tests.support.strange_networks:frozen_bottom")
    trace = make([event], architecture={"name": name, **STRANGE})
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, UPDATE, when="training", count=1)
    with pytest.raises(MisfitError, match=r":frozen' has no weight that is trained"):
        build_view(trace, evidences, UPDATE, targets, device=CPU)


def test_a_tied_weight_is_one_weight_under_its_first_name(make: Make) -> None:
    name = "tests.support.strange_networks:tied"
    trace = make([trained_update(name)], architecture={"name": name, **STRANGE})
    evidences = Evidences.of(trace)
    targets = pick_targets(evidences, UPDATE, when="training", count=1)
    view = build_view(trace, evidences, UPDATE, targets, device=CPU)
    assert view.before is not None
    assert view.buffers is not None
    assert "3.weight" in view.before
    assert not {"5.weight"} & {*view.before, *view.buffers}


def test_a_round_is_granted_whole_to_the_server_that_names_it(make: Make) -> None:
    trace = make([smashed(0, 0), smashed(1, 0), smashed(0, 1)])
    evidences = Evidences.of(trace)
    threat = replace(SMASHED, evidence=frozenset({Evidence.SMASHED, Evidence.ROUND_SMASHED}))
    targets = pick_targets(evidences, threat, when="training", count=1)
    view = build_view(trace, evidences, threat, targets, device=CPU)
    assert view.round_smashed is not None
    assert view.round_smashed[:, 0].tolist() == [0, 1, 10, 11, 100, 101]
    assert view.round_labels is not None
    bare = build_view(trace, evidences, SMASHED, targets, device=CPU)
    assert bare.round_smashed is None
    client = replace(threat, seat=Seat.CLIENT)
    with pytest.raises(MisfitError, match="only the server gets what all nodes send"):
        build_view(trace, evidences, client, targets, device=CPU)


def test_the_servers_part_is_the_one_held_at_the_rounds_end(tmp_path: Path) -> None:
    with Recorder(tmp_path / "trace", about=ABOUT) as recorder:
        recorder(smashed(0, 0))
        part = layers(architecture_of(ABOUT), stream=5)
        held = {name: value.numpy() for name, value in part.state_dict().items()}
        recorder.hold("server", "model/round-2", held)
    trace = Trace(tmp_path / "trace")
    evidences = Evidences.of(trace)
    threat = replace(SMASHED, needs=frozenset({Knowledge.SERVER_PART}))
    targets = pick_targets(evidences, threat, when="training", count=1)
    found = build_view(trace, evidences, threat, targets, device=CPU).server_part
    assert found is not None
    assert not found.training
    assert not any(each.requires_grad for each in found.parameters())
    assert all(torch.equal(value, part.state_dict()[n]) for n, value in found.state_dict().items())
    client = replace(threat, seat=Seat.CLIENT)
    with pytest.raises(MisfitError, match="the server's alone"):
        build_view(trace, evidences, client, targets, device=CPU)


def test_a_trace_without_the_servers_part_says_what_to_hold(make: Make) -> None:
    trace = make([smashed(0, 0)])
    evidences = Evidences.of(trace)
    threat = replace(SMASHED, needs=frozenset({Knowledge.SERVER_PART}))
    targets = pick_targets(evidences, threat, when="training", count=1)
    with pytest.raises(
        MisfitError, match=r"holds nothing .* recorder\.hold\('server', 'model/round-"
    ):
        build_view(trace, evidences, threat, targets, device=CPU)


def test_one_party_of_many_is_no_match_for_the_servers_part(make: Make) -> None:
    strips = make([smashed(0, 0)], divides="features", nodes=2)
    threat = replace(SMASHED, needs=frozenset({Knowledge.SERVER_PART}))
    targets = pick_targets(Evidences.of(strips), threat, when="training", count=1)
    with pytest.raises(MisfitError, match="reads what all of them send"):
        build_view(strips, Evidences.of(strips), threat, targets, device=CPU)
