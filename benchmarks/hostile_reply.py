"""What one hostile reply costs the server: time, and memory beyond what it had before.

The node of vanilla split learning answers its first message with too much of something. One case a
process: ``python -m benchmarks.hostile_reply CASE [local|ray]``, with CASE one of ``honest``,
``steps``, ``bytes``, ``arrays``, ``records``, ``words``, ``reason``. A case of 2 GB needs 5 GB of
memory at the node, which is this process on the local grid. Prints one JSON object. Linux only.
"""

import json
import logging
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from time import perf_counter

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.split_steps import Size
from leakbed.flower_internals import task_identity
from leakbed.grids import DeterministicGrid, LocalGrid, NodeFailed
from leakbed.grids.ray.grid import RayGrid
from leakbed.tap.wiretap import Wiretap
from leakbed.wire.messages import SplitReply, SplitRequest
from leakbed.wire.records import pack
from strategies import PROTOCOLS
from strategies.protocol import ProtocolSetup

CASE = "LEAKBED_HOSTILE_CASE"  # in the environment, which workers inherit
STEPS, BATCH, WIDTH = 3, 4, 256
GIGABYTES, MANY = 2, 10**6

app = ClientApp()


@app.train("split")
def split(message: Message, context: Context) -> Message:
    """Answer with a batch, and too much of what the environment says."""
    del context
    case = os.environ[CASE]
    honest = SplitReply(
        steps=STEPS,
        examples=STEPS * BATCH,
        step=SplitRequest.of(message).step,
        smashed=np.zeros((BATCH, WIDTH), np.float32),
        labels=np.zeros(BATCH, np.int64),
    )
    if case == "reason":
        raise ValueError("x" * (100 << 20))
    if case == "steps":
        honest = replace(honest, steps=10**9, examples=10**9 * BATCH)
    if case == "bytes":
        rows = (GIGABYTES << 30) // (WIDTH * 4)
        honest = replace(honest, smashed=np.zeros((rows, WIDTH), np.float32))
    return Message(_burdened(honest.records(), case), reply_to=message)


def _burdened(records: RecordDict, case: str) -> RecordDict:
    """Return records with needless ones, or needless arrays or words in them."""
    if case == "arrays":
        one = pack({"a": np.zeros(1, np.float32)})["a"]
        for number in range(MANY):
            records.array_records["smashed"][f"a{number}"] = one
    if case == "records":
        for number in range(MANY):
            records[f"m{number}"] = MetricRecord({"x": number})
    if case == "words":
        records["metrics"] = ConfigRecord({"x": bytes(GIGABYTES << 30)})
    return records


def resident() -> float:
    """Return the megabytes of memory this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Peak(Thread):
    """Looks at this process's memory every few milliseconds."""

    def __init__(self) -> None:
        """Begin with what there is."""
        super().__init__(daemon=True)
        self.megabytes, self.over = resident(), Event()

    def run(self) -> None:
        """Look until told to stop."""
        while not self.over.wait(0.005):
            self.megabytes = max(self.megabytes, resident())


def ignore(event: object) -> None:
    """See an event, as a recorder would."""
    del event


def main(case: str, kind: str = "ray") -> None:
    """Ask the hostile node for its first batch, and print what that cost."""
    os.environ[CASE] = case
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    size = Size(steps=STEPS, batch=BATCH)
    with ExitStack() as stack:
        stack.enter_context(task_identity())
        local = kind == "local"
        grid = LocalGrid(app, nodes=1) if local else RayGrid(f"{NAME}:app", nodes=1, workers=1)
        if isinstance(grid, RayGrid):
            stack.callback(grid.close)
        canonical = DeterministicGrid(grid, stream=0, roster=grid.roster)
        tap = Wiretap(canonical, [ignore], roster=grid.roster)
        built = PROTOCOLS["vanilla-split"].build(
            ProtocolSetup(
                architecture=size.architecture,
                init_stream=0,
                optimiser=size.plan.optimiser,
                nodes=1,
                fraction=1.0,
                chosen={"bottoms": "sealed", "optimizer_state": "kept"},
                labels=None,
                test_labels=torch.empty(0, dtype=torch.long),
                evaluate_rounds=(),
                defenses=(),
                defense_stream=0,
                timeout=300.0,
                device=torch.device("cpu"),
                batch_size=BATCH,
                local_steps=STEPS,
            )
        )
        before, started, peak = resident(), perf_counter(), Peak()
        peak.start()
        try:
            list(built.strategy.configure_train(1, built.arrays, ConfigRecord(), tap))
            said = "trained on"
        except NodeFailed as error:
            said = str(error)
        seconds = perf_counter() - started
        peak.over.set()
        peak.join()
    found = {"case": case, "grid": kind, "seconds": round(seconds, 2), "said": said[:200]}
    found |= {"characters": len(said), "before": round(before), "peak": round(peak.megabytes)}
    sys.stdout.write(f"{json.dumps(found)}\n")


NAME = "benchmarks.hostile_reply"

if __name__ == "__main__":
    main(*sys.argv[1:])
