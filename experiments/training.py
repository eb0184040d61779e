"""One training run on any grid: set the nodes up, train under the wiretap, keep trace and answers.

An active adversary stands at the wiretap, on the server's side of everything that is recorded.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from jaxtyping import Int
from torch import Tensor

from experiments.dependence import smashed_dependence
from experiments.detecting import found
from experiments.dividing import labels_of
from experiments.hijacking import ActiveRun
from experiments.preparing import Prepared, answer_key, make_defenses
from experiments.prototyping import gather
from experiments.run_folder import SUMMARY, TrainingRun, unfinished
from experiments.settings import JsonObject
from experiments.soundness import RefuseNonFinite
from leakbed.contracts import Defense, Protects
from leakbed.events import Event
from leakbed.grids import Canonical
from leakbed.models import resolve_device
from leakbed.opening import ADVERSARY, PUBLIC
from leakbed.seeds import scoped
from leakbed.trace import Recorder, Trace
from leakbed.wire.messages import SETUP
from leakbed.wiretap import Wiretap
from strategies import PROTOCOLS
from strategies.post import NodeStopped
from strategies.setup import Built, Setup


class NodeCountError(ValueError):
    """A federation has another number of nodes than the experiment's data."""


def train(
    prepared: Prepared, grid: Grid, folder: Path, *, roster: Mapping[int, int] | None
) -> TrainingRun:
    """Train under the wiretap.

    Args:
        prepared: From :func:`prepare`.
        grid: Any Flower grid whose nodes run our ClientApp.
        folder: Where the run is kept; a half-finished one there is replaced.
        roster: Partition id by node id where known, else the nodes are asked.

    Returns:
        The finished run.
    """
    adversary = prepared.settings.adversary
    active = None if adversary is None else ActiveRun(prepared, adversary)
    timeout = prepared.settings.protocol.timeout
    canonical = Canonical(
        grid,
        stream=prepared.stream("sampling"),
        roster=roster,
        nodes=prepared.data.nodes,
        timeout=timeout,
    )
    _check_node_count(canonical, prepared)
    _tell_nodes(canonical, prepared, timeout)
    with unfinished(folder) as work:
        summary = _record(prepared, canonical, work, active)
        if prepared.settings.intruder is not None:
            gather(canonical, prepared, work)
        if active is not None:
            summary = active.concluded(summary, work)
        (work / SUMMARY).write_text(json.dumps(summary))
        if (rival := TrainingRun.read(folder)) is not None:
            return rival  # another process finished the same run first
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # or does so just now
            work.rename(folder)
    return TrainingRun(folder=folder, **json.loads((folder / SUMMARY).read_text()))


def _record(
    prepared: Prepared, grid: Canonical, work: Path, active: ActiveRun | None
) -> JsonObject:
    """Train under the wiretap, write trace and answers, and return the summary."""
    started = perf_counter()
    with Recorder(work / "trace", about=_about(prepared)) as recorder:
        _hold_public(recorder, prepared)
        kept = recorder if _keeps_all(prepared) else SomeRounds(recorder, _wanted(prepared))
        hooks = [RefuseNonFinite(), kept]
        tap = Wiretap(grid, hooks, active=active, roster=grid.roster, strict=True)
        built, utility, stop = _start(prepared, tap, recorder, grid.roster)
    cost = {
        "seconds": perf_counter() - started,
        "bytes_up": tap.bytes_up,
        "bytes_down": tap.bytes_down,
    }
    # A stopped run has no last bottom: what it held at the last round's end is not what it sent.
    bottom = built.bottom() if built.bottom and stop is None else None
    answers = answer_key(prepared, bottom)
    answers.write(work / "answers", trace=work / "trace")
    return {
        "utility": utility,
        "cost": cost,
        "detection": found(getattr(built.strategy, "alarms", {}), stop),
        "smashed": smashed_dependence(Trace(work / "trace"), answers),
    }


def _keeps_all(prepared: Prepared) -> bool:
    """Say whether all rounds are recorded: nobody knows beforehand where a node will stop."""
    settings = prepared.settings
    return settings.keep_rounds == "all" or any(d.stop for d in make_defenses(settings))


def _wanted(prepared: Prepared) -> frozenset[int]:
    """Return the rounds that are attacked."""
    kept = prepared.settings.keep_rounds
    return frozenset({prepared.settings.protocol.rounds} if isinstance(kept, str) else kept)


class SomeRounds:
    """A hook that records only the rounds that are attacked.

    All rounds of split learning on thousands of images are gigabytes.
    """

    draws_nothing = True

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


def _check_node_count(grid: Canonical, prepared: Prepared) -> None:
    wanted, found = prepared.data.nodes, len(grid.roster)
    if wanted != found:
        raise NodeCountError(
            f"data.nodes is {wanted} but the federation has {found} nodes; run\n"
            f'  flwr run . --stream --federation-config "num-supernodes={wanted}"'
        )


def _tell_nodes(grid: Canonical, prepared: Prepared, timeout: float) -> None:
    messages = [
        Message(
            RecordDict({"cell": prepared.cell(partition).record()}),
            dst_node_id=node,
            message_type=SETUP,
        )
        for node, partition in grid.roster.items()
    ]
    list(grid.send_and_receive(messages, timeout=timeout))


def _start(
    prepared: Prepared, tap: Wiretap, recorder: Recorder, roster: Mapping[int, int]
) -> tuple[Built, dict[str, float], NodeStopped | None]:
    """Train; return the strategy, the utility, and the node that stopped, where one did."""
    protocol = prepared.settings.protocol
    entry = PROTOCOLS[protocol.name]
    built = entry.build(_setup(prepared, roster))

    def keep(round_: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Record what the server itself holds at the start and at each round's end."""
        held = {name: value.numpy() for name, value in arrays.items()}
        recorder.hold("server", f"model/round-{round_}", held)
        return None

    try:
        with scoped(prepared.stream("server")):
            result = built.strategy.start(
                tap,
                built.arrays,
                num_rounds=protocol.rounds,
                timeout=protocol.timeout,
                evaluate_fn=keep,
            )
    except NodeStopped as stop:
        return built, {}, stop  # nothing is evaluated any more
    if not len(prepared.data.split().test):
        return built, {}, None  # nothing is held out to measure utility on
    if entry.exchanges == "weights":
        return built, {"test_accuracy": _whole_accuracy(prepared, result.arrays)}, None
    metrics = result.evaluate_metrics_clientapp[protocol.rounds]
    return built, {"test_accuracy": float(str(metrics["accuracy"]))}, None


def _setup(prepared: Prepared, roster: Mapping[int, int]) -> Setup:
    dataset, rows = prepared.data.dataset(), prepared.data.split()
    protocol = prepared.settings.protocol
    at_server = protocol.labels == "server"
    return Setup(
        architecture=prepared.architecture,
        init_stream=prepared.stream("victim-init"),
        optimiser=prepared.plan.optimiser,
        nodes=prepared.data.nodes,
        fraction=protocol.fraction,
        bottoms=prepared.plan.bottoms,
        labels={node: _labels_at_server(prepared, part) for node, part in roster.items()}
        if at_server
        else None,
        test_labels=dataset.labels[rows.test],
        evaluate_rounds=(protocol.rounds,),
        defences=_server_defences(prepared),
        defence_stream=prepared.stream("defence/server"),
        timeout=protocol.timeout,
        device=resolve_device(prepared.settings.device),
        optimiser_state=prepared.plan.optimizer_state,
        stream=prepared.stream("server/lots"),
        options={key: getattr(protocol, key) for key in PROTOCOLS[protocol.name].options},
    )


def _server_defences(prepared: Prepared) -> tuple[Defense, ...]:
    chosen = make_defenses(prepared.settings)
    return tuple(d for d in chosen if d.protects & {Protects.CUT_GRADIENT, Protects.TOP})


def _labels_at_server(prepared: Prepared, partition: int) -> Int[Tensor, " rows"]:
    """Return the labels of a node's rows that the server trains with, as defences noised them."""
    labels = labels_of(prepared.data, partition)
    # Feature parties hold strips of the same rows, so that a row has one noisy label.
    place = "" if prepared.data.aligned else f"/{partition}"
    classes = len(prepared.data.dataset().classes)  # a network may have outputs no label uses
    for index, defence in enumerate(make_defenses(prepared.settings)):
        stream = prepared.stream(f"defence/server/labels/{index}{place}")
        labels = defence.noised_labels(stream, labels, classes=classes)
    return labels


def _whole_accuracy(prepared: Prepared, arrays: ArrayRecord) -> float:
    """Return the accuracy of whole weights on the held-out rows."""
    dataset, test = prepared.data.dataset(), prepared.data.split().test
    device = resolve_device(prepared.settings.device)
    model = prepared.architecture.build(0).to(device).eval()
    model.load_state_dict(arrays.to_torch_state_dict())
    hits: list[Tensor] = []
    with torch.no_grad():
        for chunk in test.split(256):
            predicted = model(dataset.images[chunk].to(device)).argmax(1).cpu()
            hits.append(predicted == dataset.labels[chunk])
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
        "architecture": asdict(prepared.architecture),
        **({"divides": "features"} if prepared.data.aligned else {}),
    }


def _hold_public(recorder: Recorder, prepared: Prepared) -> None:
    if (owned := prepared.public) is not None:
        recorder.hold(ADVERSARY, PUBLIC, owned)
