"""What defences may know of a run before it starts: enough to refuse one they cannot protect."""

from math import ceil

from experiments.cells import Training
from leakbed.contracts import Defense
from leakbed.defending import Run
from leakbed.models import Architecture
from strategies import PROTOCOLS


def check_defences(
    defences: tuple[Defense, ...],
    training: Training,
    architecture: Architecture,
    *,
    rows: tuple[int, ...],
) -> None:
    """Let every defence refuse the run; each raises its own error.

    Args:
        defences: Of the run.
        training: Its settings.
        architecture: The network; cut, where the protocol cuts it.
        rows: How many each node has.
    """
    protocol = training.protocol
    for each in rows:
        for defence in defences:
            defence.check(rows=each, batch_size=protocol.batch_size)
    if not defences or PROTOCOLS[protocol.name].exchanges != "split":
        return
    size, steps = protocol.batch_size, protocol.local_steps
    top = architecture.parts(0).top
    for each in sorted(set(rows)):
        run = Run(
            classes=architecture.num_classes,
            rows=each,
            batch_size=size,
            steps=protocol.rounds * (ceil(each / size) if steps is None else steps),
            passes=protocol.rounds * (1 if steps is None else ceil(steps * size / each)),
            top=top,
        )
        for defence in defences:
            defence.check_run(run)
