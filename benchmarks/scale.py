"""Memory and time per round with 100, 1,000 and 10,000 registered nodes, 100 of them in a round.

Each node has taken part once, and what it keeps from that is there when memory and time are taken:
with FedAvg the cell it was told, with SplitFed also its bottom and momenta. The data set is
the same for all sizes, dealt out to more or fewer nodes. Memory is that of the driver, the workers
and Ray together, each shared page counted once (Linux's proportional set size, libraries left out);
per node it is the difference between two sizes, without the parameters and momenta that must be
kept for a node.

Run alone with ``python -m benchmarks.scale``, or by ``make bench``. One JSON object a line.
"""

import gc
import json
import logging
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy.strategy_utils import sample_nodes
from torch import Tensor, nn

from benchmarks.paired import Turns, line, rounds, show, together
from clients import node_app
from clients.node import NodeConfig, TrainingPlan
from leakbed.data.config import DataConfig
from leakbed.flower_internals import task_identity
from leakbed.grids import DeterministicGrid
from leakbed.grids.base import ResidentGrid
from leakbed.models import Architecture
from leakbed.seeds import derive, scoped
from leakbed.tap.wiretap import GridWrapper
from leakbed.wire.messages import SETUP
from strategies import PROTOCOLS
from strategies.protocol import BuiltProtocol, ProtocolSetup

REGISTERED, SAMPLED, WORKERS, SEED = (100, 1_000, 10_000), 100, 2, 0
WARM, RUNS = 1, 5
MEASURED = ("fedavg", "splitfed-v1")
ALLOWED = 50.0  # kB per node beyond its parameters and momenta
# Without the pages of libraries: they are shared with whatever else runs on the machine.
_OWN_MEMORY = ("Pss_Anon:", "Pss_Shmem:")
ROWS, SIDE, HIDDEN = 10_000, 8, 32


def images() -> tuple[Tensor, Tensor]:
    """Return noise and labels, one row for each node of the largest size."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(ROWS, 1, SIDE, SIDE, generator=generator), torch.arange(ROWS) % 10


def network() -> nn.Sequential:
    """Return a bottom of 2,080 parameters and a small top; cut 1."""
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One federation.

    Attributes:
        registered: How many nodes it has.
        sampled: How many of them train in a round.
        protocol: A key of ``PROTOCOLS``.
    """

    registered: int
    sampled: int = SAMPLED
    protocol: str = "fedavg"

    def __post_init__(self) -> None:
        """Check that the nodes fall into groups of one round each.

        Raises:
            ValueError: If they do not.
        """
        if self.registered % self.sampled:
            raise ValueError(f"{self.registered} nodes are no multiple of {self.sampled} sampled")

    @property
    def architecture(self) -> Architecture:
        """The network."""
        name = "benchmarks.scale:network"
        return Architecture(name=name, image_shape=(1, SIDE, SIDE), num_classes=10, cut=1)

    @property
    def plan(self) -> TrainingPlan:
        """One step of one row, since time and memory beside the training are what is measured."""
        return TrainingPlan(
            batch_size=1, local_steps=1, momentum=0.9, bottoms="relayed", optimizer_state="kept"
        )

    def cell(self, partition: int) -> Message:
        """Return the message that tells a node its cell; node ids are those of our own grids."""
        data = DataConfig(
            name="benchmarks.scale:images",
            nodes=self.registered,
            stream=SEED,
            public=0.0,
            test=0.0,
        )
        cell = NodeConfig(
            data=data,
            architecture=self.architecture,
            plan=self.plan,
            partition=partition,
            stream=derive(SEED, f"node/{partition}"),
            defense_stream=derive(SEED, f"defence/{partition}"),
        )
        records = RecordDict({"cell": cell.record()})
        return Message(records, dst_node_id=partition + 1, message_type=SETUP)

    def built(self) -> BuiltProtocol:
        """Return the protocol, which trains all nodes of the grids it is started on."""
        entry = PROTOCOLS[self.protocol]
        setup = ProtocolSetup(
            architecture=self.architecture,
            init_stream=derive(SEED, "victim-init"),
            optimiser=self.plan.optimiser,
            nodes=self.sampled,
            fraction=1.0,
            labels=None,
            test_labels=torch.empty(0, dtype=torch.long),
            evaluate_rounds=(),
            defenses=(),
            defense_stream=0,
            timeout=None,
            device=torch.device("cpu"),
            chosen={
                **{key: legal[0] for key, legal in entry.choices.items()},
                "optimizer_state": self.plan.optimizer_state,
            },
        )
        return entry.build(setup)

    @property
    def own_bytes(self) -> int:
        """Bytes that must be kept for a node that was there: its parameters and momenta."""
        if PROTOCOLS[self.protocol].exchanges == "weights":
            return 0  # FedAvg's nodes start from the server's weights and without momenta
        parts = self.architecture.parts(0)
        # Bottom and momenta at the node; at the server the momenta of its copy of the top.
        return 2 * _bytes(parts.bottom) + _bytes(parts.top)


class Group(GridWrapper):
    """A grid that shows some of its nodes only."""

    def __init__(self, grid: Grid, nodes: Collection[int]) -> None:
        """Wrap a grid.

        Args:
            grid: Any.
            nodes: The ids to show.
        """
        super().__init__(grid)
        self._nodes = nodes

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of the group."""
        return list(self._nodes)


def serve(grid: ResidentGrid, scale: Scale, turns: Turns) -> None:
    """Let every node take part once, tell the memory, then train one round at each turn.

    Args:
        grid: One of our own, all of whose nodes are new.
        scale: The federation.
        turns: When.
    """
    roster = grid.roster
    canonical = DeterministicGrid(grid, stream=SEED, roster=roster)
    built = scale.built()

    def one_round(nodes: Collection[int]) -> None:
        built.strategy.start(Group(canonical, nodes), built.arrays, num_rounds=1)

    for nodes in _groups(list(roster), scale.sampled):
        canonical.send_and_receive([scale.cell(roster[node]) for node in nodes])
        one_round(nodes)
    gc.collect()
    turns.tell(bytes=memory())
    while turns.wait():
        started = perf_counter()
        sampled, _ = sample_nodes(canonical, scale.sampled, scale.sampled)
        one_round(sampled)
        turns.tell(seconds=perf_counter() - started)


def on_ray(scale: Scale, turns: Turns) -> None:
    """Serve from a RayGrid."""
    from leakbed.grids.ray.grid import RayGrid  # noqa: PLC0415  Ray takes seconds to import

    with RayGrid(node_app, nodes=scale.registered, workers=WORKERS) as grid:
        serve(grid, scale, turns)


def memory() -> int:
    """Return the bytes that this process and all it started hold; a shared page counts once."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue  # it has just ended
        parents.setdefault(int(parent), []).append(int(folder.name))
    total, left = 0, [int(Path("/proc/self").resolve().name)]
    while left:
        process = left.pop()
        left += parents.get(process, [])
        try:
            rows = (Path("/proc") / str(process) / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(row.split()[1]) << 10 for row in rows if row.startswith(_OWN_MEMORY))
    return total


def _bytes(part: nn.Module) -> int:
    return sum(int(tensor.nbytes) for tensor in part.state_dict().values())


def _groups(nodes: Sequence[int], size: int) -> list[Sequence[int]]:
    return [nodes[start : start + size] for start in range(0, len(nodes), size)]


def measured(
    protocol: str,
    *,
    registered: Sequence[int] = REGISTERED,
    sampled: int = SAMPLED,
    warm: int = WARM,
    runs: int = RUNS,
) -> list[dict[str, object]]:
    """Return the lines of a protocol: each size against the smallest.

    Args:
        protocol: A key of ``PROTOCOLS``.
        registered: The sizes, the smallest first.
        sampled: Nodes that train in a round, of every size.
        warm: Rounds of each size that do not count.
        runs: Rounds of each size that do.

    Returns:
        Two lines for each size but the first: its memory and its time.
    """
    scales = [Scale(registered=count, sampled=sampled, protocol=protocol) for count in registered]
    commands = {
        f"{scale.registered}": [sys.executable, "-m", "benchmarks.scale", json.dumps(asdict(scale))]
        for scale in scales
    }
    with ExitStack() as stack:
        sides = together(commands, stack)
        taken = rounds(sides, warm=warm, runs=runs)
        held = {name: side.ready()["bytes"] for name, side in sides.items()}
    small, *larger = scales
    lines = []
    for scale in larger:
        more = held[f"{scale.registered}"] - held[f"{small.registered}"]
        each = more / (scale.registered - small.registered) - scale.own_bytes
        which = f"{protocol}, {scale.registered} registered nodes"
        memory = f"{which}: memory per node beyond its own parameters / what is allowed"
        lines.append(line(memory, [(each / 1000, ALLOWED)], unit="kB"))
        time = f"{which}, {sampled} in a round: its time / with {small.registered} registered"
        sizes = f"{scale.registered}", f"{small.registered}"
        pairs = [(turn[sizes[0]]["seconds"], turn[sizes[1]]["seconds"]) for turn in taken]
        lines.append(line(time, pairs, unit="s"))
    return lines


def main(arguments: list[str]) -> None:
    """Measure every protocol and print the lines, or be one federation.

    Args:
        arguments: None, or the federation.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if arguments:
        torch.set_num_threads(1)
        with task_identity(), scoped(SEED):
            on_ray(Scale(**json.loads(arguments[0])), Turns())
        return
    for protocol in MEASURED:
        for result in measured(protocol):
            show(result)


if __name__ == "__main__":
    main(sys.argv[1:])
