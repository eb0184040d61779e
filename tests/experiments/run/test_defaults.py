import pytest

from experiments.run.defaults import resolve_defaults, resolve_protocol
from experiments.settings.cells import cells
from experiments.settings.load import load_settings
from experiments.settings.protocol import ProtocolSettings
from experiments.settings.schema import SettingsError
from strategies import PROTOCOLS


@pytest.mark.parametrize("name", PROTOCOLS)
def test_nothing_a_protocol_has_is_left_open(name: str) -> None:
    entry, protocol = PROTOCOLS[name], resolve_protocol(ProtocolSettings(name=name))
    assert protocol.labels == entry.labels[0]
    assert protocol.bottoms == entry.bottoms[0]
    assert protocol.optimizer_state == entry.optimizer_state[0]
    for option, values in entry.options.items():
        assert getattr(protocol, option) == values[0]
    assert resolve_protocol(protocol) == protocol


def test_a_legal_choice_is_kept() -> None:
    chosen = ProtocolSettings(name="vanilla-split", labels="server", bottoms="relayed")
    protocol = resolve_protocol(chosen)
    assert (protocol.labels, protocol.bottoms) == ("server", "relayed")


@pytest.mark.parametrize(
    ("name", "setting", "match"),
    [
        ("vanilla-split", {"labels": "client"}, "'client': vanilla-split takes 'shared' or 'serv"),
        ("u-shaped", {"labels": "shared"}, "labels = 'shared': u-shaped takes 'client'"),
        ("splitfed-v1", {"bottoms": "sealed"}, "'sealed': splitfed-v1 takes 'relayed'"),
        ("vanilla-split", {"sync": "step"}, "'step': vanilla-split takes nothing: leave it out"),
        ("vertical-split", {"sync": "round"}, "sync = 'round': vertical-split takes nothing"),
    ],
)
def test_what_a_split_protocol_does_not_have_is_refused(
    name: str, setting: dict[str, str], match: str
) -> None:
    with pytest.raises(SettingsError, match=match):
        resolve_protocol(ProtocolSettings(name=name, **setting))  # type: ignore[arg-type]


def test_fedavg_ignores_what_split_cases_of_one_table_set() -> None:
    protocol = resolve_protocol(ProtocolSettings(name="fedavg", labels="server", sync="step"))
    assert protocol.name == "fedavg"


def test_a_settled_cell_says_what_it_runs_with() -> None:
    table = {
        "name": "one",
        "protocol": {"name": "splitfed-v1"},
        "attack": [{"name": "constant-image"}],
    }
    (cell,) = map(resolve_defaults, cells(load_settings(table, ())))
    assert cell.as_json()["protocol"]["bottoms"] == "relayed"
    assert cell.training.protocol.optimizer_state == "fresh"
