"""What a malicious client got: its samples, asked for after the run, and what they are worth.

The oracle judges them, since no message of the protocol holds an original of theirs. Beside them
stands what the same intruder makes of a network that never trains: as many turns, the same noise,
and nothing to be learned but what an untrained network says.
"""

from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from clients.malicious import MaliciousClientSession
from experiments.run.attack import Attacked, Cell
from experiments.run.prepare import Prepared
from experiments.run.targets import MisfitError
from experiments.run.training_run import SAMPLES, TrainingRun
from leakbed.contracts import Guess
from leakbed.grids import DeterministicGrid
from leakbed.tensors import finite
from leakbed.wire.messages import SAMPLES as QUERY
from leakbed.wire.records import CONFIG, METRICS, as_arrays, int_field

UNTRAINED = "untrained-victim"
"""The baseline of an intruder whose network never trained."""


def gather(grid: DeterministicGrid, prepared: Prepared, work: Path) -> None:
    """Ask every malicious node for its samples, once the training is over.

    Args:
        grid: Of the run; nothing here is part of the protocol, so no tap sees it.
        prepared: The run.
        work: The run's folder.
    """
    if (chosen := prepared.settings.intruder) is None:
        return
    count = -(-chosen.samples // len(chosen.nodes))
    asked = [
        Message(
            RecordDict({CONFIG: ConfigRecord({"count": count})}),
            dst_node_id=node,
            message_type=QUERY,
        )
        for node, partition in grid.roster.items()
        if partition in chosen.nodes
    ]
    images, turns = [], []
    for reply in grid.send_and_receive(asked, timeout=prepared.settings.protocol.timeout):
        arrays = as_arrays(reply.content.array_records["arrays"])
        images.append(torch.from_numpy(arrays["images"].copy()))
        turns.append(int_field(reply, reply.content.metric_records[METRICS], "turns"))
    kept = {"images": torch.cat(images)[: chosen.samples], "turns": torch.tensor(turns)}
    save_file(kept, work / SAMPLES)
    (work / SAMPLES).chmod(0o600)


def without_intruder(prepared: Prepared) -> Prepared:
    """Return the run in which the malicious nodes do as honest ones do."""
    return replace(prepared, settings=replace(prepared.settings, intruder=None))


def sampled(run: TrainingRun, cell: Cell, prepared: Prepared) -> Attacked:
    """Return a malicious client's samples as its guess, those of an untrained network beside it.

    Args:
        run: Trained with it.
        cell: The intruder's.
        prepared: That run's ingredients.

    Returns:
        One target per sample.

    Raises:
        MisfitError: If it never had a turn.
    """
    held = load_file(run.samples)
    if not int(held["turns"].sum()):
        raise MisfitError(
            "no malicious node was ever sampled for a round; set protocol.fraction = 1, or more "
            "rounds"
        )
    images = held["images"].unsqueeze(1)
    failed = torch.tensor([not finite(image) for image in images])
    guess = Guess(images=images, failed=failed)
    untrained = _untrained(prepared, run, count=len(images))
    return Attacked(
        attack=cell.attack,
        targets=(),
        guess=guess,
        seconds=0.0,
        rivals={UNTRAINED: Guess(images=untrained.unsqueeze(1))},
    )


def _untrained(
    prepared: Prepared, run: TrainingRun, *, count: int
) -> Float[Tensor, " count *image"]:
    """Return an intruder's samples after as many turns with the network as it was at first."""
    cells = [prepared.cell(node) for node in _malicious(prepared)]
    had = load_file(run.samples)["turns"].tolist()
    made = []
    for cell, turns in zip(cells, had, strict=True):
        network = prepared.architecture.build(prepared.stream("victim-init"))
        if (intrusion := MaliciousClientSession.of(cell)) is not None:
            rows = prepared.plan.batch_size
            intrusion.train_offline(network.to(cell.torch_device()), turns=turns, rows=rows)
            made.append(intrusion.samples(-(-count // len(cells))).cpu())
    return torch.cat(made)[:count]


def _malicious(prepared: Prepared) -> tuple[int, ...]:
    """Return the malicious nodes in the order in which they answered."""
    chosen = prepared.settings.intruder
    return () if chosen is None else tuple(sorted(chosen.nodes))
