"""A recorded run as its owner opens it: messages, truth, and how its nodes trained."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clients.node import TrainingPlan
from defenses import DEFENSES
from experiments.run.view import architecture_of
from leakbed.contracts import Defense, Protects, select
from leakbed.contracts.noise_laws import NoCeilingError
from leakbed.data.partitioning import BY_SIZE
from leakbed.models import Architecture
from leakbed.oracle.truth import AnswerKey
from leakbed.plugins import is_own, picked
from leakbed.seeds import derive
from leakbed.tap.facts import refuse_import
from leakbed.tap.trace import Trace


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """A recorded run, opened by its owner.

    Attributes:
        trace: Its messages.
        key: Its truth.
        plan: How nodes trained.
        defenses: In order.
        architecture: The network.
    """

    trace: Trace
    key: AnswerKey
    plan: TrainingPlan
    defenses: tuple[Defense, ...]
    architecture: Architecture

    @classmethod
    def open(cls, run: Path, *, model: str | None = None) -> Recorded:
        """Open a run's folder.

        Args:
            run: With ``trace`` and ``answers``.
            model: As for :func:`~experiments.run.ceilings.ceiling_of_run`.

        Returns:
            The run.

        Raises:
            NoCeilingError: If it lacks what a ceiling needs.
        """
        for part, what in (("trace", "recorded messages"), ("answers", "answer key")):
            if not (run / part).is_dir():
                raise NoCeilingError(
                    f"{run} has no {what}: there is no folder {part!r}; name a run's own folder, "
                    "such as results/runs/<run>"
                )
        trace = Trace(run / "trace")
        return cls.of(trace, AnswerKey.read(run / "answers", trace=run / "trace"), model=model)

    @classmethod
    def of(cls, trace: Trace, key: AnswerKey, *, model: str | None = None) -> Recorded:
        """Take a run whose trace and answer key are open already, perhaps in memory alone.

        Args:
            trace: Its messages.
            key: Its truth.
            model: As for :func:`~experiments.run.ceilings.ceiling_of_run`.

        Returns:
            The run.

        Raises:
            NoCeilingError: If it lacks what a ceiling needs.
        """
        refuse_import(trace.about, model)
        if not key.training:
            raise NoCeilingError(
                f"the answer key of {trace.folder.parent} does not say how nodes trained and with "
                "which defences: an earlier version wrote it; run the experiment again"
            )
        if key.training.get("intruder"):
            raise NoCeilingError(
                "a node of this run was malicious and made its own batches, which the answer key "
                "does not hold"
            )
        named = key.training["defenses"]
        for name, _ in named:
            if is_own(name) and name.partition(":")[0] not in sys.modules:
                raise NoCeilingError(
                    f"the run's defence is a class of somebody's own, {name!r}, and importing it "
                    "runs the code there; set [ceiling] in the experiment that has it, or import "
                    "it yourself before you call ceiling_of_run"
                )
        return cls(
            trace=trace,
            key=key,
            plan=TrainingPlan(**key.training["plan"]),
            defenses=tuple(picked(name, DEFENSES, "defence")(**own) for name, own in named),
            architecture=architecture_of(trace.about),
        )

    def option(self, name: str) -> str:
        """Return what was chosen of the run's protocol, an option whose values are texts.

        Args:
            name: One of :attr:`strategies.Protocol.choices`.

        Returns:
            Its value.

        Raises:
            NoCeilingError: If the answer key does not say.
        """
        chosen = self.key.training.get("options", {})
        if name not in chosen:
            raise NoCeilingError(
                f"the answer key does not say the run's protocol.{name}: an earlier version wrote "
                "it; run the experiment again"
            )
        return str(chosen[name])

    def trained_labels(self) -> Int[Tensor, " rows"]:
        """Return labels as whoever trains with them has them: answered at random by defences.

        Returns:
            Of all rows of the answer key.

        Raises:
            NoCeilingError: If the answer key does not say by what they were drawn.
        """
        if not select(self.defenses, Protects.LABELS):
            return self.key.labels
        sizes, seed = self.key.training.get("rows"), self.key.seed
        if seed is None or sizes is None:
            raise NoCeilingError(
                "the answer key does not say the run's seed, or how many rows each node has, so "
                "the labels that were trained with are not known; run the experiment again"
            )
        made = []
        for node, own in enumerate(self._by_node(sizes)):
            labels = own
            for index, defense in enumerate(self.defenses):
                stream = derive(seed, f"defence/{node}")
                role = f"labels/{index}"
                if self.plan.labels == "server":
                    stream = seed
                    place = "" if self.key.parties > 1 else f"/{node}"
                    role = f"defence/server/labels/{index}{place}"
                labels = defense.noised_labels(
                    derive(stream, role), labels, classes=self.key.num_classes
                )
            made.append(labels)
        return torch.cat(made)

    def prior_of(
        self, node: int, candidates: Int[Tensor, " candidates"]
    ) -> Float[Tensor, " candidates"] | None:
        """Return how likely candidates are a node's, for who knows all its other rows.

        Rows that were not dealt out at random have the node's classes: who knows the others of the
        node guesses these. An earlier version took all candidates for equally likely; corrected
        2026-11-29.

        Args:
            node: The node.
            candidates: Rows of the answer key.

        Returns:
            The node's share of each one's class, over that class's candidates; None for equal ones.

        Raises:
            NoCeilingError: If the answer key is of a version that did not say how rows were dealt,
                or some labels are not those by which rows were dealt.
        """
        key, sizes = self.key, self.key.training.get("rows")
        if key.parties > 1:
            return None
        if sizes is None or "partition" not in key.training:
            raise NoCeilingError(
                "the answer key does not say how rows were dealt out to nodes; record the run again"
            )
        if key.training["partition"] == "iid":
            return None
        if key.canaries and key.training["partition"] not in BY_SIZE:
            raise NoCeilingError(
                f"no ceiling of rows: data.partition = {key.training['partition']!r} dealt them "
                "out by their labels, and those of canaries were drawn anew since, so what their "
                "images tell of a node is not known here; leave out data.canaries, or set "
                "data.partition = 'iid'"
            )
        labels = key.labels[candidates]
        own = torch.bincount(self._by_node(sizes)[node], minlength=key.num_classes).double()
        shares = own[labels] / torch.bincount(labels, minlength=key.num_classes)[labels]
        return shares / shares.sum()

    def _by_node(self, sizes: Sequence[int]) -> Sequence[Int[Tensor, " rows"]]:
        """Return each node's labels; those of parties once."""
        return [self.key.labels] if self.key.parties > 1 else self.key.labels.split(list(sizes))

    def node_stream(self, node: int) -> int | None:
        """Return a node's own stream; None where the run's seed is not known."""
        return None if self.key.seed is None else derive(self.key.seed, f"node/{node}")
