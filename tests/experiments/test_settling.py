import pytest

from experiments.cells import cells
from experiments.settings import SettingsError
from experiments.settings_file import load_settings
from experiments.settings_protocol import ProtocolSettings
from experiments.settling import resolved, settled
from strategies import PROTOCOLS


@pytest.mark.parametrize("name", PROTOCOLS)
def test_nothing_a_protocol_has_is_left_open(name: str) -> None:
    entry, protocol = PROTOCOLS[name], resolved(ProtocolSettings(name=name))
    assert protocol.labels == entry.labels[0]
    assert protocol.bottoms == entry.bottoms[0]
    assert protocol.optimizer_state == entry.optimiser_state[0]
    for option, values in entry.options.items():
        assert getattr(protocol, option) == values[0]
    assert resolved(protocol) == protocol


def test_a_legal_choice_is_kept() -> None:
    chosen = ProtocolSettings(name="vanilla-split", labels="server", bottoms="relayed")
    protocol = resolved(chosen)
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
        resolved(ProtocolSettings(name=name, **setting))  # type: ignore[arg-type]


def test_fedavg_ignores_what_split_cases_of_one_table_set() -> None:
    protocol = resolved(ProtocolSettings(name="fedavg", labels="server", sync="step"))
    assert protocol.name == "fedavg"


def test_a_settled_cell_says_what_it_runs_with() -> None:
    table = {
        "name": "one",
        "protocol": {"name": "splitfed-v1"},
        "attack": [{"name": "constant-image"}],
    }
    (cell,) = map(settled, cells(load_settings(table, ())))
    assert cell.as_json()["protocol"]["bottoms"] == "relayed"
    assert cell.training.protocol.optimizer_state == "fresh"
