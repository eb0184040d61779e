"""What DLM and DLM+ share: dummy images whose gradient explains the difference of two weight sets.

A node that takes a step sends weights whose difference from those it received is its gradient times
an unknown learning rate. Dummy images and labels are optimised until their gradient at the received
weights explains that difference; each attack says what explaining means. All targets are one
stacked optimisation, with second derivatives by ``torch.func``.

Source: Zhu, Liu, Han, *Deep Leakage from Gradients*, NeurIPS 2019,
https://arxiv.org/abs/1906.08935; for weights in place of gradients, the sources of the two attacks.

What the update must be: plain SGD. Momentum changes nothing in a first step from an empty buffer;
weight decay adds a multiple of the weights and Adam's first step is a sign, which no gradient
explains: the objective stays high.

Departures:
- Arithmetic is in float64; the weights stay what they were sent as.
- Steps must lower the objective (``guard``); the published optimiser takes every step.
- A target that one random start does not solve is tried from others.
- Several local steps count as one step over all their images, which holds for small learning rates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad_and_value, vmap

from attacks.batched_adam import Adam, descend
from attacks.batched_lbfgs import Lbfgs, Minimum, Objective, Problems, minimise
from attacks.dummy_gradients import Clues, Dummies, Weights, clues
from leakbed.contracts import Evidence, Guess, Knowledge, Seat, ThreatModel, View
from leakbed.naming import unknown
from leakbed.seeds import derive

LEGAL = {
    "labels": ("inferred", "analytic", "given"),
    "optimizer": ("lbfgs", "adam"),
}


@dataclass(frozen=True, kw_only=True)
class GradientMatching:
    """The settings of both attacks, and all of them but the objective.

    Attributes:
        labels: ``"inferred"`` optimises them with the images; ``"analytic"`` reads the label of a
            single image off the last bias (iDLG, https://arxiv.org/abs/2001.02610); ``"given"``
            takes the true ones.
        optimizer: ``"lbfgs"``, or ``"adam"``, the authors' choice for perceptrons.
        guard: Whether L-BFGS takes only steps that lower the objective; published: no.
        iterations: Evaluations of one try; ``None`` is 500 for L-BFGS (published: 4000) and 5000
            for Adam.
        learning_rate: ``None`` is the published one: 1 for L-BFGS, 0.1 for Adam.
        history: Curvature pairs that L-BFGS keeps.
        restarts: Random starts tried at most; a later one only for targets not yet solved.
        solved: A target whose mismatch is no higher is not tried again.
        good_enough: A try ends when its objective is no higher.
        patience: A try ends after so many evaluations without progress; ``None`` never ends it.
        stack: Targets optimised at once, which bounds memory.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    labels: str = "inferred"
    optimizer: str = "lbfgs"
    guard: bool = True
    iterations: int | None = None
    learning_rate: float | None = None
    history: int = 100
    restarts: int = 4
    solved: float = 1e-5
    good_enough: float = 1e-9
    patience: int | None = 100
    stack: int = 64

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: One is outside the values it may take.
        """
        for setting, legal in LEGAL.items():
            if getattr(self, setting) not in legal:
                raise ValueError(unknown(setting, getattr(self, setting), legal))
        for setting in ("history", "restarts", "stack"):
            if getattr(self, setting) < 1:
                raise ValueError(f"{setting} is {getattr(self, setting)}; it must be at least 1")

    @property
    def threat(self) -> ThreatModel:
        """A server that follows FedAvg, and knows the layers and the number of samples."""
        needs = {Knowledge.ARCHITECTURE, Knowledge.BATCH_PLAN}
        return ThreatModel(
            seat=Seat.SERVER,
            evidence=frozenset({Evidence.UPDATE}),
            needs=frozenset(needs | {Knowledge.LABELS} if self.labels == "given" else needs),
        )

    def unknowns(self, clues: Clues, attempt: int) -> Float[Tensor, " targets unknowns"]:
        """Return where the unknowns beside images and labels start: none, unless overridden.

        Args:
            clues: About the targets.
            attempt: Number of the try, from 0.

        Returns:
            One row per target.
        """
        del attempt
        return clues.last.new_empty(len(clues.last), 0)

    def objective(
        self, gradient: Weights, update: Weights, *, unknowns: Float[Tensor, " unknowns"]
    ) -> Float[Tensor, ""]:
        """Return how badly a dummy gradient explains one target's update; 0 for the true images.

        Args:
            gradient: Of the dummy images and labels.
            update: The weights the victim started from less those it sent.
            unknowns: The other variables of the search.

        Returns:
            Lower is better.

        Raises:
            NotImplementedError: Each attack has its own.
        """
        raise NotImplementedError

    def mismatch(
        self, gradient: Weights, update: Weights, *, objective: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """Return what the tries at one target are compared by: the objective, unless overridden.

        Args:
            gradient: Of the dummy images and labels where the try ended.
            update: The weights the victim started from less those it sent.
            objective: Its value there.

        Returns:
            Lower is better.
        """
        del gradient, update
        return objective

    def run(self, view: View, *, seed: int) -> Guess:
        """Search for the images and labels that explain every target's update.

        Args:
            view: With ``before``, ``after`` and ``architecture``, and ``labels`` if they are given.
            seed: Draws the random starts; each depends on the seed, the target and the try alone.

        Returns:
            Images, labels and the mismatch of the best try at each target.
        """
        dummies = Dummies.of(view)
        everything = clues(view, labels=self.labels)
        targets = torch.arange(view.targets, device=everything.last.device)
        ends = [
            self._solve(dummies, everything.of(some), targets=some, seed=seed)
            for some in targets.split(self.stack)
        ]
        point = torch.cat([point for point, _ in ends])
        mismatch = torch.cat([mismatch for _, mismatch in ends])
        return Guess(
            images=dummies.images(point).float(),
            labels=dummies.soft_labels(point, everything).argmax(-1),
            objective=mismatch.float(),
            failed=~mismatch.isfinite(),
        )

    def _solve(
        self, dummies: Dummies, clues: Clues, *, targets: Int[Tensor, " targets"], seed: int
    ) -> tuple[Float[Tensor, " targets size"], Float[Tensor, " targets"]]:
        """Return the best of several tries at a stack of targets, and its mismatch."""
        streams = [derive(seed, f"target/{target}") for target in targets.tolist()]
        point, mismatch = self._try(dummies, clues, streams=streams, attempt=0)
        for attempt in range(1, self.restarts):
            unsolved = torch.nonzero(mismatch > self.solved).squeeze(1)
            if not len(unsolved):
                break
            again, found = self._try(
                dummies,
                clues.of(unsolved),
                streams=[streams[row] for row in unsolved.tolist()],
                attempt=attempt,
            )
            better = found < mismatch[unsolved]
            point = point.index_copy(0, unsolved[better], again[better])
            mismatch = mismatch.index_copy(0, unsolved[better], found[better])
        return point, mismatch

    def _try(
        self, dummies: Dummies, clues: Clues, *, streams: Sequence[int], attempt: int
    ) -> tuple[Float[Tensor, " targets size"], Float[Tensor, " targets"]]:
        """Return where the search ends from one random start per target, and its mismatch."""
        drawn = [dummies.draw(derive(stream, f"try/{attempt}")) for stream in streams]
        extra = self.unknowns(clues, attempt)
        start = torch.cat([torch.stack(drawn).to(extra.device), extra], dim=1)
        end = self._minimise(self._problems(dummies, clues), start)

        def judged(point: Tensor, clues: Clues, value: Tensor) -> Tensor:
            return self.mismatch(dummies.gradient(point, clues), clues.update, objective=value)

        mismatch = vmap(judged)(end.point, clues, end.value)
        usable = end.value.isfinite() & mismatch.isfinite()
        return end.point, mismatch.where(usable, torch.inf)

    def _problems(self, dummies: Dummies, clues: Clues) -> Problems:
        """Return the objective of each target, stacked as the optimisers want it."""

        def one(point: Tensor, clues: Clues) -> Tensor:
            unknowns = point[dummies.sizes[1] :]
            return self.objective(dummies.gradient(point, clues), clues.update, unknowns=unknowns)

        def of(targets: Tensor) -> Objective:
            fixed = clues.of(targets)

            def objective(points: Tensor) -> tuple[Tensor, Tensor]:
                gradient, value = vmap(grad_and_value(one))(points, fixed)
                return value, gradient

            return objective

        return of

    def _minimise(self, problems: Problems, start: Float[Tensor, " targets size"]) -> Minimum:
        """Run the optimiser of the settings."""
        if self.optimizer == "adam":
            adam = Adam(
                iterations=self.iterations or 5000,
                learning_rate=self.learning_rate or 0.1,
                good_enough=self.good_enough,
            )
            return descend(problems, start, adam)
        lbfgs = Lbfgs(
            iterations=self.iterations or 500,
            learning_rate=self.learning_rate or 1.0,
            history=self.history,
            good_enough=self.good_enough,
            patience=self.patience,
            guard=self.guard,
        )
        return minimise(problems, start, lbfgs)
