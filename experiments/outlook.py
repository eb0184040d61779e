"""What defences may know of a run before it starts: enough to refuse one they cannot protect."""

from math import ceil

from experiments.cells import Training
from leakbed.contracts import Defense, Protects
from leakbed.defending import Run
from leakbed.gradient_defences import refuse_order
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
    refuse_order([each for each in defences if Protects.CUT_GRADIENT in each.protects])
    top = architecture.parts(0).top
    # Where parties hold strips, each of them is sent a gradient of the same row.
    parties = 1 if PROTOCOLS[protocol.name].divides == "rows" else training.data.nodes
    for each in sorted(set(rows)):
        run = Run(
            classes=architecture.num_classes,
            rows=each,
            batch_size=size,
            steps=protocol.rounds * (ceil(each / size) if steps is None else steps),
            passes=parties * protocol.rounds * (1 if steps is None else ceil(steps * size / each)),
            top=top,
        )
        for defence in defences:
            defence.check_run(run)
