"""Train once, on any grid: set the nodes up, train under the wiretap, keep trace and answers.

An active adversary stands at the wiretap, on the server's side of everything that is recorded; a
watcher stands among the hooks, which can change nothing.

Another hook stops a run at the first value on the wire that is not finite.

Beside the training stands how much smashed data depend on the images behind them, whoever reads
them: the distance correlation that NoPeek minimises, measured on what a run really sent.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from jaxtyping import Int
from torch import Tensor

from clients import node_app
from experiments.run.alarms import found
from experiments.run.prepare import Prepared, answer_key, labels_of, passes_of
from experiments.run.training_run import SUMMARY, TrainingRun, unfinished
from experiments.run.view import ADVERSARY, PUBLIC
from experiments.settings.plugins import JsonObject
from experiments.settings.schema import Settings
from leakbed.contract_checks import blamed
from leakbed.contracts import Protects, select
from leakbed.distance_correlation import corrected_correlation, distance_correlation
from leakbed.events import Arrays, Event, Phase, SmashedUp, arrays_of
from leakbed.grids import DeterministicGrid, LocalGrid, NodeFailed
from leakbed.lookup import import_object
from leakbed.oracle.truth import AnswerKey
from leakbed.plugins import is_own
from leakbed.provenance import RanOn
from leakbed.seeds import scoped
from leakbed.tap.trace import Recorder, Trace
from leakbed.tap.wiretap import PassiveHook, Wiretap
from leakbed.tensors import as_tensor, finite, load, predicted, resolve_device
from leakbed.wire.messages import SETUP, SPLIT_STEP
from strategies import find_protocol
from strategies.node_channel import NodeStopped
from strategies.protocol import BuiltProtocol, ProtocolSetup
from strategies.split_strategy import SplitStrategy

if TYPE_CHECKING:
    from experiments.run.malicious_server import LiveAdversary


class NonFiniteError(RuntimeError):
    """A message holds NaN or infinity; says which node, round and step."""


class RefuseNonFinite:
    """Passive hook: raises on the first event with a value that is not finite."""

    draws_nothing = True
    only_reads = True

    def __call__(self, event: Event) -> None:
        """Check one event.

        Args:
            event: Any.

        Raises:
            NonFiniteError: If one of its arrays holds NaN or infinity.
        """
        for field, arrays in arrays_of(event).items():
            for name, array in arrays.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise NonFiniteError(
                        f"{field} {name!r} of node {event.node} is not finite in round "
                        f"{event.round}, step {event.step}; lower protocol.learning_rate"
                    )


_BATCHES = 20  # enough for an error of a hundredth, of batches of 64
_LEAST = 4  # rows from which the corrected estimate exists


def smashed_dependence(trace: Trace, answers: AnswerKey) -> dict[str, float]:
    """Return the distance correlation of images and smashed data in a run's last round.

    Each batch is of another bottom, so estimates are of one batch each.

    Args:
        trace: Of the run.
        answers: Its answer key.

    Returns:
        ``corrected``: the squared correlation without bias, 0 for independent data; ``plain``: the
        published estimate, which reads about 0.95 for independent data in batches of 64; both the
        mean over ``batches`` training batches. Empty where no whole images were smashed.
    """
    last = max((int(record.fields.get("round", 0)) for record in trace.records), default=0)
    if answers.parties > 1:
        return {}
    plain: list[float] = []
    corrected: list[float] = []
    for event in trace.events(SmashedUp, round_=last):
        if not isinstance(event, SmashedUp) or event.phase != Phase.TRAIN:
            continue
        if len(event.smashed) < _LEAST or len(plain) == _BATCHES:
            continue
        rows = torch.tensor(answers.order[event.node, event.round, event.step])
        images, smashed = answers.images[rows].double(), torch.from_numpy(event.smashed).double()
        plain.append(float(distance_correlation(images, smashed)))
        corrected.append(float(corrected_correlation(images, smashed)))
    if not plain:
        return {}
    return {"corrected": fmean(corrected), "plain": fmean(plain), "batches": len(plain)}


class NodeCountError(ValueError):
    """A federation has another number of nodes than the experiment's data."""


def train(
    prepared: Prepared, grid: Grid, folder: Path, *, roster: Mapping[int, int] | None
) -> TrainingRun:
    """Train under the wiretap; a run that cannot be put into its folder is an ``OSError``.

    Args:
        prepared: From :func:`~experiments.run.prepare.prepare`.
        grid: Any Flower grid whose nodes run our ClientApp.
        folder: Where the run is kept; a half-finished one there is replaced.
        roster: Partition id by node id where known, else the nodes are asked.

    Returns:
        The finished run.
    """
    settings, protocol, live = prepared.settings, prepared.settings.protocol, None
    if settings.adversary is not None:
        live = _acting(_ADVERSARY)(prepared, settings.adversary)
    canonical = DeterministicGrid(
        grid,
        stream=prepared.stream("sampling"),
        roster=roster,
        nodes=prepared.data.nodes,
        timeout=protocol.timeout,
    )
    _check_node_count(canonical, prepared)
    devices = _tell_nodes(canonical, prepared, protocol.timeout)
    with unfinished(folder) as work:
        started, stop, utility = perf_counter(), None, {}
        with Recorder(work / "trace", about=_about(prepared)) as recorder:
            _hold_public(recorder, prepared)
            tap = _tap(prepared, canonical, recorder, live)
            with _blamed(protocol.name):
                built = _built(prepared, canonical, live)
                try:
                    with scoped(prepared.stream("server")):
                        result = built.strategy.start(
                            tap,
                            built.arrays,
                            num_rounds=protocol.rounds,
                            timeout=protocol.timeout,
                            evaluate_fn=_keeper(recorder),
                        )
                    utility = _utility(prepared, result)
                except NodeStopped as error:  # nothing is evaluated any more
                    stop = error
        seconds = perf_counter() - started
        cost = {"seconds": seconds, "bytes_up": tap.bytes_up, "bytes_down": tap.bytes_down}
        summary = {"utility": utility, "cost": cost, **_kept(prepared, built, stop, work)}
        if settings.intruder is not None:
            _acting(_INTRUDER)(canonical, prepared, work)
        if live is not None:
            summary = live.concluded(summary, work)
        (work / SUMMARY).write_text(json.dumps({**summary, "devices": devices}))
        return _moved(work, folder)


def _moved(work: Path, folder: Path) -> TrainingRun:
    """Put a finished run into its folder, unless another process finished the same one first."""
    if (rival := TrainingRun.read(folder)) is not None:
        return rival
    shutil.rmtree(folder, ignore_errors=True)
    try:
        work.rename(folder)
    except OSError:
        if TrainingRun.read(folder) is None:  # else another did so just now
            raise
    return TrainingRun(folder=folder, **json.loads((folder / SUMMARY).read_text()))


_ADVERSARY, _INTRUDER = "adversary", "intruder"
_ACTING = {
    "adversary": "experiments.run.malicious_server:LiveAdversary",
    "intruder": "experiments.run.malicious_client:gather",
}
"""Who acts in a run; named rather than imported, so that no other run's key depends on it."""


def _acting(role: str) -> Callable[..., Any]:
    found = import_object(_ACTING[role])
    if not callable(found):
        raise TypeError(f"{_ACTING[role]} is {found!r}, which cannot be called")
    return found


def _tap(
    prepared: Prepared,
    grid: DeterministicGrid,
    recorder: Recorder,
    live: "LiveAdversary | None",
) -> Wiretap:
    """Return the wiretap of a run, with all that reads or forges at it."""
    kept = recorder if _keeps_all(prepared) else SomeRounds(recorder, _wanted(prepared))
    hooks: list[PassiveHook] = [RefuseNonFinite(), kept]
    active = live if live is not None and live.forges else None
    if live is not None and active is None:
        hooks.append(live)
    return Wiretap(grid, hooks, active=active, roster=grid.roster, strict=True)


def _built(
    prepared: Prepared, grid: DeterministicGrid, live: "LiveAdversary | None"
) -> BuiltProtocol:
    """Return a run's strategy with its first weights."""
    entry = find_protocol(prepared.settings.protocol.name)
    built = entry.build(_setup(prepared, grid.roster))
    if live is not None and isinstance(built.strategy, SplitStrategy):
        live.stands_beside(built.strategy)
    return built


def _kept(
    prepared: Prepared, built: BuiltProtocol, stop: NodeStopped | None, work: Path
) -> JsonObject:
    """Write the answer key, and return what the summary says of a run that is over."""
    # A stopped run has no last bottom: what it held at the last round's end is not what it sent.
    answers = answer_key(prepared, _last_bottom(built) if stop is None else None)
    answers.write(work / "answers", trace=work / "trace")
    return {
        "detection": found(getattr(built.strategy, "alarms", {}), stop),
        "smashed": smashed_dependence(Trace(work / "trace"), answers),
        "seed": prepared.settings.seed,
    }


def _last_bottom(built: BuiltProtocol) -> Arrays | None:
    """Return the last bottom for the answer key; None where there is no one bottom.

    A sealed one was read by no node and no server after its sender, unless an evaluation followed.
    """
    bottom = None if built.bottom is None else built.bottom()
    for name, array in (bottom or {}).items():
        if not finite(as_tensor(array)):
            node = int(getattr(built.strategy, "sender", None) or 0)
            cause = f"array {name!r} of the bottom it sent last is not finite"
            raise NodeFailed(node, SPLIT_STEP, cause)
    return bottom


def _keeps_all(prepared: Prepared) -> bool:
    """Say whether all rounds are recorded: nobody knows beforehand where a node will stop."""
    settings = prepared.settings
    return settings.keep_rounds == "all" or any(each.stop for each in prepared.defenses)


def _wanted(prepared: Prepared) -> frozenset[int]:
    """Return the rounds that are attacked."""
    kept = prepared.settings.keep_rounds
    return frozenset({prepared.settings.protocol.rounds} if isinstance(kept, str) else kept)


class SomeRounds:
    """A hook that records only the rounds that are attacked.

    All rounds of split learning on thousands of images are gigabytes.
    """

    draws_nothing = True
    only_reads = True

    def __init__(self, recorder: Recorder, rounds: frozenset[int]) -> None:
        """Wrap a recorder.

        Args:
            recorder: Writes what is kept.
            rounds: Numbers of the rounds to keep.
        """
        self._recorder, self._rounds = recorder, rounds | {0}

    def __call__(self, event: Event) -> None:
        """Record an event of a round to keep, or one that belongs to none."""
        if event.round in self._rounds:
            self._recorder(event)


def _check_node_count(grid: DeterministicGrid, prepared: Prepared) -> None:
    wanted, found = prepared.data.nodes, len(grid.roster)
    if wanted != found:
        raise NodeCountError(
            f"data.nodes is {wanted} but the federation has {found} nodes; run\n"
            f'  flwr run . --stream --federation-config "num-supernodes={wanted}"'
        )


def _tell_nodes(grid: DeterministicGrid, prepared: Prepared, timeout: float) -> list[str]:
    """Give every node the cell; return the devices they compute on, each once."""
    messages = [
        Message(
            RecordDict({"cell": prepared.cell(partition).record()}),
            dst_node_id=node,
            message_type=SETUP,
        )
        for node, partition in grid.roster.items()
    ]
    devices: set[str] = set()
    expected = {prepared.settings.plugins(): prepared.ran_on}
    for reply in grid.send_and_receive(messages, timeout=timeout):
        node = grid.roster[reply.metadata.src_node_id]
        ran_on = RanOn.of(reply)
        parts = prepared.cell(node).plugins()  # a malicious node has no defences
        expected[parts] = expected.get(parts) or prepared.found(parts)
        expected[parts].check(f"node {node}", ran_on)
        if ran_on is not None:
            devices.add(ran_on.device)
    return sorted(devices)


def _blamed(name: str) -> AbstractContextManager[None]:
    """Blame a protocol of one's own by its path for what its code raises."""
    build = find_protocol(name).build
    return blamed(name, "protocol", within=build) if is_own(name) else nullcontext()


def _keeper(recorder: Recorder) -> Callable[[int, ArrayRecord], None]:
    """Return what records the server's own weights at the start and at each round's end."""

    def keep(round_: int, arrays: ArrayRecord) -> None:
        held = {name: value.numpy() for name, value in arrays.items()}
        recorder.hold("server", f"model/round-{round_}", held)

    return keep


def _utility(prepared: Prepared, result: Result) -> dict[str, float]:
    """Return what a trained model is good for; nothing where no rows were held out."""
    protocol = prepared.settings.protocol
    if not len(prepared.data.split().test):
        return {}
    if find_protocol(protocol.name).exchanges == "weights":
        return {"test_accuracy": _whole_accuracy(prepared, result.arrays)}
    metrics = result.evaluate_metrics_clientapp[protocol.rounds]
    return {"test_accuracy": float(str(metrics["accuracy"]))}


def _setup(prepared: Prepared, roster: Mapping[int, int]) -> ProtocolSetup:
    dataset, rows = prepared.data.dataset(), prepared.data.split()
    protocol = prepared.settings.protocol
    at_server = protocol.labels == "server"
    return ProtocolSetup(
        architecture=prepared.architecture,
        init_stream=prepared.stream("victim-init"),
        optimiser=prepared.plan.optimiser,
        nodes=prepared.data.nodes,
        fraction=protocol.fraction,
        labels={node: _labels_at_server(prepared, part) for node, part in roster.items()}
        if at_server
        else None,
        test_labels=dataset.labels[rows.test],
        evaluate_rounds=(protocol.rounds,),
        defenses=select(prepared.defenses, Protects.CUT_GRADIENT, Protects.TOP),
        defense_stream=prepared.stream("defence/server"),
        timeout=protocol.timeout,
        device=resolve_device(prepared.settings.device),
        stream=prepared.stream("server/lots"),
        chosen=protocol.chosen,
        protocol=protocol.name,
        batch_size=protocol.batch_size,
        local_steps=protocol.local_steps,
        rows={node: len(rows.nodes[part]) for node, part in roster.items()},
        passes=max(passes_of(prepared.settings, rows=len(own)) for own in rows.nodes),
    )


def _labels_at_server(prepared: Prepared, partition: int) -> Int[Tensor, " rows"]:
    """Return the labels of a node's rows that the server trains with, as defences noised them."""
    labels = labels_of(prepared.data, partition)
    # Feature parties hold strips of the same rows, so that a row has one noisy label.
    place = "" if prepared.data.aligned else f"/{partition}"
    for index, defense in enumerate(prepared.defenses):
        stream = prepared.stream(f"defence/server/labels/{index}{place}")
        labels = defense.noised_labels(stream, labels, classes=prepared.data.num_classes)
    return labels


def _whole_accuracy(prepared: Prepared, arrays: ArrayRecord) -> float:
    """Return the accuracy of whole weights on the held-out rows; no finite output is no hit."""
    dataset, test = prepared.data.dataset(), prepared.data.split().test
    device = resolve_device(prepared.settings.device)
    model = prepared.architecture.build(0).to(device).eval()
    load(model, arrays.to_torch_state_dict())
    hits: list[Tensor] = []
    with torch.no_grad():
        for chunk in test.split(256):
            named = predicted(model(dataset.images[chunk].to(device))).cpu()
            hits.append(named == dataset.labels[chunk])
    return torch.cat(hits).float().mean().item()


def _about(prepared: Prepared) -> dict[str, Any]:
    """Say what an adversary may know of the run: no seed, no learning rate."""
    protocol = prepared.settings.protocol
    return {
        "protocol": protocol.name,
        "labels": protocol.labels,
        "bottoms": protocol.bottoms,
        "rounds": protocol.rounds,
        "batch_size": protocol.batch_size,
        "local_steps": protocol.local_steps,
        "nodes": prepared.data.nodes,
        "data": prepared.data.name,
        "defense": prepared.settings.defense.name,
        "architecture": {
            key: value
            for key, value in asdict(prepared.architecture).items()
            if key not in {"mean", "std"} and value != ()  # our own runs feed pixels
        },
        "modes": {Phase.TRAIN: "train", Phase.EVALUATE: "eval"},  # of the node's network
        **({"divides": "features"} if prepared.data.aligned else {}),
    }


def _hold_public(recorder: Recorder, prepared: Prepared) -> None:
    if (owned := prepared.public) is not None:
        recorder.hold(ADVERSARY, PUBLIC, owned)


class Grids(Protocol):
    """Makes, or lends, the grid a training run needs."""

    def __call__(self, nodes: int) -> Any:  # noqa: ANN401  a context manager of (grid, roster)
        """Return a context manager of a grid and its roster, or None where it must be asked."""
        ...


def grids_of(settings: Settings) -> Grids:
    """Return what makes the grids of an experiment that is not run by Flower.

    Args:
        settings: Of the experiment.

    Returns:
        For a number of nodes, a grid that ends with the context.
    """

    @contextmanager
    def local(nodes: int) -> Iterator[tuple[Grid, Mapping[int, int]]]:
        grid = LocalGrid(node_app, nodes=nodes)
        yield grid, grid.roster

    @contextmanager
    def on_ray(nodes: int) -> Iterator[tuple[Grid, Mapping[int, int]]]:
        from leakbed.grids.ray.grid import RayGrid  # noqa: PLC0415  Ray takes seconds to import

        at_cpu = resolve_device(settings.device).type == "cpu"  # as the keys of its cards say
        with RayGrid(
            node_app,
            nodes=nodes,
            workers=settings.workers,
            num_gpus=0.0 if at_cpu else settings.gpus_per_worker,
            address=settings.ray_address,
        ) as grid:
            yield grid, grid.roster

    return on_ray if settings.grid == "ray" else local
