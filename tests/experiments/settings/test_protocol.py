"""What a protocol takes stands in its entry alone: settings are held to it, and filled from it."""

from dataclasses import replace
from typing import Any

import pytest

from experiments.settings.cells import Training, cells
from experiments.settings.load import load_settings
from experiments.settings.protocol import ProtocolSettings
from experiments.settings.schema import Settings, SettingsError
from strategies import PROTOCOLS, Protocol

BUILD = PROTOCOLS["vanilla-split"].build
OWN = Protocol(
    exchanges="split",
    build=BUILD,
    options={"lag": (1, 2), "share": (1.0, 0.5), "warm": (False, True), "sync": ("late", "never")},
)
WEIGHTS = Protocol(exchanges="weights", build=BUILD, parts=1)
TAKEN = Protocol(exchanges="split", build=BUILD, options={"rounds": (1, 2)})
HERE = f"{__name__}:OWN"


def settings(**changes: Any) -> Settings:
    return load_settings({"name": "one", "attack": [{"name": "constant-image"}], **changes})


def trainings(*overrides: str, **changes: Any) -> list[Training]:
    return [cell.training for cell in cells(load_settings(settings(**changes), overrides))]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_nothing_a_protocol_has_is_left_open(name: str) -> None:
    protocol, choices = ProtocolSettings(name=name), PROTOCOLS[name].choices
    default = {key: legal[0] for key, legal in choices.items()}
    assert protocol.chosen == default
    assert ProtocolSettings(**default, name=name) == protocol
    assert protocol.model_dump(exclude_unset=True) == {"name": name}


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        ("vanilla-split", {"labels": "client"}, "'client': vanilla-split takes 'shared' or 'serv"),
        ("u-shaped", {"labels": "shared"}, "labels = 'shared': u-shaped takes 'client'"),
        ("splitfed-v1", {"bottoms": "sealed"}, "'sealed': splitfed-v1 takes 'relayed'"),
        ("vanilla-split", {"sync": "step"}, "key of protocol vanilla-split 'sync'; .*legal: batch"),
        ("fedavg", {"rounds": None}, "rounds"),
        ("fedavg", {"lerning_rate": None}, "did you mean 'learning_rate'"),
        ("fedavg", {"merge": "sum"}, "unknown key of protocol fedavg 'merge'"),
        ("parallel-split", {"synch": "round"}, "did you mean 'sync'. legal: .*gradient_scale"),
        ("parallel-split", {"sync": "rounds"}, "sync = 'rounds': parallel-split takes 'round' or"),
        (HERE, {"lag": 3}, "lag = 3: .*:OWN takes 1 or 2"),
        (HERE, {"lag": True}, "lag = True"),
        (HERE, {"warm": 1}, "warm = 1: .* takes False or True"),
        (HERE, {"merge": "sum"}, "OWN 'merge'; .*legal: .*lag, .*share, sync, .*warm"),
        (f"{__name__}:TAKEN", {}, "has an option 'rounds', which is a key of every protocol"),
    ],
)
def test_what_a_protocol_does_not_take_is_refused(
    name: str, given: dict[str, Any], match: str
) -> None:
    with pytest.raises(SettingsError, match=match):
        settings(protocol={"name": name, **given})


def test_where_weights_are_exchanged_any_holder_of_labels_is_taken_and_none_is_asked() -> None:
    for name in ("fedavg", f"{__name__}:WEIGHTS"):
        assert settings(protocol={"name": name, "labels": "client"}).protocol.labels == "client"


def test_an_option_without_a_name_beside_it_is_refused_and_says_what_to_do() -> None:
    with pytest.raises(
        SettingsError, match="fedavg is the default: write another's name beside its"
    ):
        settings(protocol={"sync": "step"})


def test_an_option_may_be_a_number_or_a_bool() -> None:
    protocol = settings(protocol={"name": HERE, "share": 1, "warm": True}).protocol
    assert protocol.chosen.items() >= {"share": 1.0, "warm": True, "lag": 1, "sync": "late"}.items()
    assert isinstance(protocol.chosen["share"], float)


@pytest.mark.parametrize("values", [(), "fast", (None,), ("fast", ("slow",))])
def test_a_protocol_whose_options_cannot_be_chosen_is_refused(values: Any) -> None:
    made = replace(OWN)
    object.__setattr__(made, "options", {"pace": values})  # past the types that tests check
    with pytest.raises(ValueError, match=r"'pace' has the legal values .* write a tuple"):
        made.__post_init__()


def test_options_are_replaced_by_cases_sweeps_and_the_command_line() -> None:
    parallel: dict[str, Any] = {"protocol": {"name": "parallel-split", "gradient_scale": "local"}}
    cases = [{"name": "a", "protocol": {"sync": "step"}}, {"name": "b", "protocol.sync": "round"}]
    found = trainings(**parallel, case=cases)
    assert [each.protocol.chosen["sync"] for each in found] == ["step", "round"]
    assert {each.protocol.chosen["gradient_scale"] for each in found} == {"local"}
    found = trainings(**parallel, sweep={"protocol.sync": ["step", "round"]})
    assert [each.protocol.chosen["sync"] for each in found] == ["step", "round"]
    (found,) = trainings("protocol.sync=step", **parallel)
    assert found.protocol.chosen.items() >= {"sync": "step", "gradient_scale": "local"}.items()


def test_a_case_of_another_protocol_leaves_options_behind_and_keeps_the_rest() -> None:
    base = {"name": "parallel-split", "sync": "step", "labels": "server", "rounds": 3}
    other = {"name": "other", "protocol.name": HERE}
    (found,) = trainings(protocol=base, case=[other])
    assert (found.protocol.labels, found.protocol.rounds) == ("server", 3)
    assert found.protocol.chosen["sync"] == "late"
    (found,) = trainings("protocol.name=splitfed-v1")  # defaults of FedAvg do not stay either
    assert (found.protocol.bottoms, found.protocol.optimizer_state) == ("relayed", "fresh")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"case": [{"name": "a", "protocol.sync": "step"}]},
            "case 'a': protocol: unknown key of",
        ),
        ({"sweep": {"protocol.sync": ["step"]}}, "sweep: protocol: unknown key of protocol fedavg"),
        ({"sweep": {"protocol.rounds": [1, 0]}}, r"sweep: protocol.rounds: .* \(got 0\)"),
        ({"case": [{"name": "a", "protocol.rounds": 0}]}, r"case 'a': protocol.rounds: .*got 0"),
        ({"case": [{"name": "a", "protocol": 3}]}, "unknown dotted key 'protocol'"),
        (
            {
                "case": [{"name": "a", "protocol.sync": "step"}],
                "sweep": {"protocol.name": ["parallel-split", "u-shaped"]},
            },
            "case 'a': protocol: unknown key of protocol u-shaped 'sync'",
        ),
    ],
)
def test_cases_and_sweeps_are_held_to_the_protocol_that_they_come_to(
    changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(SettingsError, match=match):
        settings(**changes)


def test_cards_have_the_keys_they_had_when_every_protocol_had_every_option() -> None:
    (found,) = trainings()
    told = found.as_json()["protocol"]
    assert (told["sync"], told["gradient_scale"], told["merge"]) == (None, None, None)
    (found,) = trainings(protocol={"name": "vertical-split", "merge": "sum"})
    assert found.as_json()["protocol"]["merge"] == "sum"
    assert "lag" not in found.as_json()["protocol"]
