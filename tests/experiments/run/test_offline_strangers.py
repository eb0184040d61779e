"""Apps as strangers write them, each tapped in one line, and what is attacked of their traces."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from experiments.results.cards import read_cards
from experiments.run.offline import attack_trace
from leakbed.events import Extras, UpdateUp
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.tap import Trace, about, tapped
from leakbed.tap.wiretap import GridWrapper
from tests.support.small_app import CLASSES, network

MODEL, SHAPE = "tests.support.own_model:Net", (1, 4, 4)
SAID = about(
    model=MODEL, image_shape=SHAPE, num_classes=CLASSES, batch_size=8, nodes=2, data="theirs"
)
FEW = {"iterations": 2}
Metrics = Callable[[int], dict[str, int | float]]


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with task_identity():
        yield


def trained(weights: dict[str, torch.Tensor], rows: int) -> torch.nn.Module:
    """One step of gradient descent."""
    net = network(MODEL, SHAPE)
    net.load_state_dict(weights)
    labels = torch.arange(rows) % CLASSES
    torch.nn.functional.cross_entropy(net(torch.rand(rows, *SHAPE)), labels).backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    return net


def client(rows: Callable[[int], int], metrics: Metrics, *, control: bool) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = rows(int(context.node_config["partition-id"]))
        net = trained(message.content["arrays"].to_torch_state_dict(), number)
        weights = net.state_dict()
        content = RecordDict({"arrays": ArrayRecord(weights)})
        content["metrics"] = MetricRecord(dict(metrics(number)))
        if control:
            content["control"] = ArrayRecord({k: torch.zeros_like(v) for k, v in weights.items()})
        return Message(content, reply_to=message)

    return app


class TwoRecords(FedAvg):
    """A strategy that takes the control variates out before it averages."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        received = list(replies)
        for reply in received:
            reply.content.pop("control", None)
        return super().aggregate_train(server_round, received)


def recorded(
    folder: Path,
    *,
    rows: Callable[[int], int] = lambda partition: 1,
    metrics: Metrics = lambda number: {"num-examples": number},
    control: bool = False,
    **settings: Any,
) -> Path:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        weights = ArrayRecord(network(MODEL, SHAPE).state_dict())
        strategy = TwoRecords(fraction_evaluate=0.0, **settings)
        strategy.start(grid, weights, num_rounds=1)

    return run(app, client(rows, metrics, control=control), folder)


class Running(GridWrapper):
    """A grid that knows of its run what Flower's older strategies ask for."""

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=1)


def run(app: ServerApp, nodes: ClientApp, folder: Path) -> Path:
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    tapped(app, folder, about=SAID)(Running(LocalGrid(nodes, nodes=2)), context)
    return folder / "1"


@pytest.mark.parametrize("name", ["dlm-plus", "constant-image"])
def test_nodes_may_hold_different_numbers_of_samples(tmp_path: Path, name: str) -> None:
    trace = recorded(tmp_path, rows=lambda partition: partition + 1)
    card = attack_trace(trace, name, settings=FEW if name == "dlm-plus" else {}, model=MODEL)
    assert card.status == "unscored"
    assert any("updates over 1 were attacked, others (1 over 2)" in note for note in card.notes)


def test_two_attacks_on_one_trace_are_two_results(tmp_path: Path) -> None:
    """Else the later one takes the place of the other, and a gate never sees what leaked more."""
    trace = recorded(tmp_path)
    first = attack_trace(trace, "constant-image", model=MODEL)
    other = attack_trace(trace, "dlm-plus", settings=FEW, model=MODEL)
    longer = attack_trace(trace, "dlm-plus", settings={**FEW, "iterations": 3}, model=MODEL)
    assert len({card.key for card in (first, other, longer)}) == 3
    kept = read_cards(trace.parent / f"{trace.name}-attacked")
    assert sorted(card.attack for card in kept) == ["constant-image", "dlm-plus", "dlm-plus"]


@pytest.mark.parametrize("key", ["n", "num_examples"])
def test_an_app_may_weigh_by_any_key(tmp_path: Path, key: str) -> None:
    trace = recorded(tmp_path, metrics=lambda number: {key: number}, weighted_by_key=key)
    assert attack_trace(trace, "dlm-plus", settings=FEW, model=MODEL).status == "unscored"


def test_a_number_of_samples_may_be_a_float(tmp_path: Path) -> None:
    trace = recorded(tmp_path, metrics=lambda number: {"num-examples": float(number)})
    assert attack_trace(trace, "dlm-plus", settings=FEW, model=MODEL).status == "unscored"


def test_control_variates_may_travel_beside_the_weights(tmp_path: Path) -> None:
    trace = recorded(tmp_path, control=True)
    assert attack_trace(trace, "dlm-plus", settings=FEW, model=MODEL).status == "unscored"
    beside = [event for event in Trace(trace).events(Extras) if event.up]  # type: ignore[attr-defined]
    assert [set(event.content) for event in beside] == [{"control"}] * 2  # type: ignore[attr-defined]


def test_an_older_app_is_attacked_though_its_arrays_are_numbered(tmp_path: Path) -> None:
    from flwr.client import NumPyClient  # noqa: PLC0415  deprecated, and slow to import
    from flwr.common import ndarrays_to_parameters  # noqa: PLC0415
    from flwr.server import ServerAppComponents, ServerConfig  # noqa: PLC0415
    from flwr.server.strategy import FedAvg as OldFedAvg  # noqa: PLC0415

    names = list(network(MODEL, SHAPE).state_dict())

    class Client(NumPyClient):
        def fit(self, parameters: Any, config: Any) -> Any:
            weights = {n: torch.tensor(v) for n, v in zip(names, parameters, strict=True)}
            net = trained(weights, 1)
            return [value.numpy() for value in net.state_dict().values()], 1, {"a": 1.0}

    def server_fn(context: Context) -> ServerAppComponents:
        values = network(MODEL, SHAPE).state_dict().values()
        initial = ndarrays_to_parameters([value.numpy() for value in values])
        strategy = OldFedAvg(fraction_evaluate=0.0, initial_parameters=initial)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

    nodes = ClientApp(client_fn=lambda context: Client().to_client())
    trace = run(ServerApp(server_fn=server_fn), nodes, tmp_path)
    updates = list(Trace(trace).events(UpdateUp))
    assert [update.examples for update in updates] == [1] * 4  # type: ignore[attr-defined]
    assert sorted({update.round for update in updates}) == [1, 2]
    assert attack_trace(trace, "dlm-plus", settings=FEW, model=MODEL).status == "unscored"
