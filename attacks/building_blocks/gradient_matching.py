"""What DLM and DLM+ share: dummy images whose gradient explains the difference of two weight sets.

A node that takes a step sends weights whose difference from those it received is its gradient times
an unknown learning rate. Dummy images and labels are optimised until their gradient at the received
weights explains that difference; each attack says what explaining means. All targets are one
stacked optimisation, with second derivatives by ``torch.func``.

Source: Zhu, Liu, Han, *Deep Leakage from Gradients*, NeurIPS 2019,
https://arxiv.org/abs/1906.08935; for weights in place of gradients, the sources of the two attacks.

What the update must be: plain SGD. Momentum changes nothing in a first step from an empty buffer;
weight decay adds a multiple of the weights and Adam's first step is a sign, which no gradient
explains: the objective stays high. BatchNorm behind the first layer takes the contrast out of the
images before any gradient: they come back right up to a scale that says nothing.

Departures:
- Arithmetic is in float64; the weights stay what they were sent as.
- Steps must lower the objective (``guard``); the published optimiser takes every step.
- A target that one random start does not solve is tried from others.
- A try stops where its gradient is nothing beside its first one (``tolerance``), its objective
  nothing beside its first (``good_enough``), the rounding of the sent weights explains what is
  left of it, or nothing is gained any more (``patience``). An earlier version stopped at torch's
  absolute 1e-7, which PyTorch's default initialisation reaches after about 35 evaluations, with
  nothing to see; and after 500 evaluations for the published 4,000.
- Several local steps count as one step over all their images, which holds for small learning rates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn.functional import one_hot

from attacks.building_blocks.batched_optimizers import (
    Adam,
    Lbfgs,
    Minimum,
    Objective,
    Problems,
    descend,
    minimise,
)
from attacks.building_blocks.dummy_gradients import Clues, Dummies, Weights, clues
from leakbed.contracts import Evidence, Guess, Knowledge, Seat, ThreatModel, UnfitViewError, View
from leakbed.lookup import unknown_name
from leakbed.seeds import derive

ROUNDING = 10.0  # `solved`: mismatches within this factor of what rounding leaves are all one

_SURE = 30.0  # a score that softmax makes a certain label of

LEGAL = {
    "labels": ("inferred", "analytic", "given"),
    "optimizer": ("lbfgs", "adam"),
}


class _End(NamedTuple):
    """Where the search for each target ended.

    Attributes:
        point: Dummy images, labels and other unknowns.
        mismatch: There; infinite where the search broke down.
        on_budget: Whether it would have gone on with more evaluations.
    """

    point: Float[Tensor, " targets size"]
    mismatch: Float[Tensor, " targets"]
    on_budget: Bool[Tensor, " targets"]


@dataclass(frozen=True, kw_only=True)
class GradientMatching:
    """The settings of both attacks, and all of them but the objective.

    Attributes:
        labels: ``"inferred"`` optimises them with the images; ``"analytic"`` reads the label of a
            single image off the last bias (iDLG, https://arxiv.org/abs/2001.02610); ``"given"``
            takes the true ones.
        optimizer: ``"lbfgs"``, or ``"adam"``, the authors' choice for perceptrons.
        guard: Whether L-BFGS takes only steps that lower the objective; published: no.
        iterations: Evaluations of one try at most; ``None`` is the published number: 4000 for
            L-BFGS (200 calls of 20) and 5000 for Adam.
        learning_rate: ``None`` is the published one: 1 for L-BFGS, 0.01 for Adam.
        tolerance: An L-BFGS try ends when no entry of its gradient is larger than this share of the
            largest of its first one; ``None`` is 1e-12. Without ``guard`` it is torch's
            ``tolerance_grad``, absolute, and ``None`` is torch's (and so the published) 1e-7.
        history: Curvature pairs that L-BFGS keeps.
        restarts: Random starts tried at most; a later one only for targets not yet solved.
        solved: A target whose mismatch is no higher is not tried again; nor is one whose mismatch
            is no more than ten times what the rounding of the sent weights alone would leave.
        good_enough: A try ends when its objective is no higher than this share of its first; or
            than what the rounding of the sent weights alone would leave.
        patience: An L-BFGS try ends after so many evaluations that have not lowered its objective
            by a thousandth; ``None`` never ends it.
        stack: Targets optimised at once, which bounds memory.
        most_rows: Samples behind an update at most; every one is an image more to search for.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    labels: str = "inferred"
    optimizer: str = "lbfgs"
    guard: bool = True
    iterations: int | None = None
    learning_rate: float | None = None
    tolerance: float | None = None
    history: int = 100
    restarts: int = 4
    solved: float = 1e-9
    good_enough: float = 1e-13
    patience: int | None = 100
    stack: int = 64
    most_rows: int = 64

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: One is outside the values it may take.
        """
        for setting, legal in LEGAL.items():
            if getattr(self, setting) not in legal:
                raise ValueError(unknown_name(setting, getattr(self, setting), legal))
        self._check_numbers()

    def _check_numbers(self) -> None:
        """Refuse numbers out of range."""
        for setting in ("iterations", "patience", "history", "restarts", "stack", "most_rows"):
            value = getattr(self, setting)
            if value is not None and value < 1:
                raise ValueError(f"{setting} is {value}; it must be at least 1{_left_out(setting)}")
        for setting in ("tolerance", "learning_rate"):
            value = getattr(self, setting)
            if value is not None and not 0 < value < inf:
                raise ValueError(
                    f"{setting} is {value}; it must be finite and above 0{_left_out(setting)}"
                )
        for setting in ("solved", "good_enough"):
            if not getattr(self, setting) >= 0:
                raise ValueError(f"{setting} is {getattr(self, setting)}; it must be at least 0")

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

    def level(
        self, update: Weights, rounded: Weights, *, unknowns: Float[Tensor, " unknowns"]
    ) -> Float[Tensor, ""]:
        """Return the objective that the true images would have, about, for the rounding alone.

        Args:
            update: The weights the victim started from less those it sent.
            rounded: How far rounding moved the latter.
            unknowns: The other variables of the search, where they start.

        Returns:
            Where a search may end; 0 where that is not known.
        """
        seen = {name: update[name] + rounded[name] for name in update}
        return self.objective(update, seen, unknowns=unknowns)

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

        Raises:
            UnfitViewError: More samples lie behind an update than ``most_rows``.
        """
        if view.rows > self.most_rows:
            raise UnfitViewError(
                f"{view.rows} samples lie behind each update, more than most_rows = "
                f"{self.most_rows}: all their {view.rows * prod(view.image_shape)} pixels would be "
                "searched for at once, for hours and in gigabytes; lower protocol.batch_size or "
                "protocol.local_steps (left out, a whole pass over a node's data), or raise the "
                "attack's most_rows"
            )
        dummies = Dummies.of(view)
        everything = clues(view, labels=self.labels)
        targets = torch.arange(view.targets, device=everything.last.device)
        ends = [
            self._solve(dummies, everything.of(some), targets=some, seed=seed)
            for some in targets.split(self.stack)
        ]
        point, mismatch, on_budget = (torch.cat(each) for each in zip(*ends, strict=True))
        return Guess(
            images=dummies.images(point).float(),
            labels=dummies.soft_labels(point, everything).argmax(-1),
            objective=mismatch.float(),
            failed=~mismatch.isfinite(),
            stopped_on_budget=on_budget & mismatch.isfinite(),
        )

    def explained(
        self,
        view: View,
        images: Float[Tensor, " targets rows channels height width"],
        labels: Int[Tensor, " targets rows"],
    ) -> tuple[Float[Tensor, " targets"], Float[Tensor, " targets"]]:
        """Say how well given images would explain every target's update, and how well is solved.

        Args:
            view: As for :meth:`run`.
            images: One set per target.
            labels: Theirs; where the attack is given labels, those are taken.

        Returns:
            What :meth:`run` returns as the objective, of these images; and at which of it a target
            counts as solved.
        """
        dummies, told = Dummies.of(view), clues(view, labels=self.labels)
        scores = _SURE * one_hot(labels, view.num_classes).to(told.last)
        points = torch.cat([images.to(told.last).flatten(1), scores.flatten(1)], dim=1)

        def judged(point: Tensor, clues: Clues, unknowns: Tensor) -> Tensor:
            gradient = dummies.gradient(point, clues)
            value = self.objective(gradient, clues.update, unknowns=unknowns)
            return self.mismatch(gradient, clues.update, objective=value)

        found: Tensor = vmap(judged)(points, told, self.unknowns(told, 0))
        return found, self._levels(told)[1]

    def _levels(self, clues: Clues) -> tuple[Float[Tensor, " targets"], Float[Tensor, " targets"]]:
        """Return the objective at which a try ends and the mismatch at which a target is solved.

        An update is known to the rounding of the weights that were sent. Even the true images leave
        the mismatch of that rounding, and no search can go much below it.
        """

        def one(clues: Clues, unknowns: Tensor) -> tuple[Tensor, Tensor]:
            level = self.level(clues.update, clues.rounding, unknowns=unknowns)
            seen = {name: clues.update[name] + clues.rounding[name] for name in clues.update}
            return level, self.mismatch(clues.update, seen, objective=level)

        level, mismatch = vmap(one)(clues, self.unknowns(clues, 0))
        solved = (ROUNDING * mismatch.nan_to_num(0.0)).clamp(min=self.solved)
        return level.nan_to_num(0.0), solved

    def _solve(
        self, dummies: Dummies, clues: Clues, *, targets: Int[Tensor, " targets"], seed: int
    ) -> _End:
        """Return the best of several tries at a stack of targets.

        A target stopped on the budget if none of its tries solved it and any of them did.
        """
        streams = [derive(seed, f"target/{target}") for target in targets.tolist()]
        _, solved = self._levels(clues)
        best = self._try(dummies, clues, streams=streams, attempt=0)
        ever = best.on_budget
        for attempt in range(1, self.restarts):
            unsolved = torch.nonzero(best.mismatch > solved).squeeze(1)
            if not len(unsolved):
                break
            again = self._try(
                dummies,
                clues.of(unsolved),
                streams=[streams[row] for row in unsolved.tolist()],
                attempt=attempt,
            )
            ever = ever.index_copy(0, unsolved, ever[unsolved] | again.on_budget)
            better = again.mismatch < best.mismatch[unsolved]
            best = _End(
                *(
                    old.index_copy(0, unsolved[better], new[better])
                    for old, new in zip(best, again, strict=True)
                )
            )
        return best._replace(on_budget=ever & (best.mismatch > solved))

    def _try(self, dummies: Dummies, clues: Clues, *, streams: Sequence[int], attempt: int) -> _End:
        """Return where the search ends from one random start per target."""
        drawn = [dummies.draw(derive(stream, f"try/{attempt}")) for stream in streams]
        extra = self.unknowns(clues, attempt)
        start = torch.cat([torch.stack(drawn).to(extra.device), extra], dim=1)
        level, _ = self._levels(clues)
        end = self._minimise(self._problems(dummies, clues), start, enough=level)

        def judged(point: Tensor, clues: Clues, value: Tensor) -> Tensor:
            return self.mismatch(dummies.gradient(point, clues), clues.update, objective=value)

        mismatch = vmap(judged)(end.point, clues, end.value)
        usable = end.value.isfinite() & mismatch.isfinite()
        return _End(end.point, mismatch.where(usable, torch.inf), end.on_budget)

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

    def _minimise(
        self,
        problems: Problems,
        start: Float[Tensor, " targets size"],
        *,
        enough: Float[Tensor, " targets"],
    ) -> Minimum:
        """Run the optimiser of the settings."""
        if self.optimizer == "adam":
            adam = Adam(
                iterations=self.iterations or 5000,
                learning_rate=self.learning_rate or 0.01,
                good_enough=self.good_enough,
            )
            return descend(problems, start, adam, enough=enough)
        lbfgs = Lbfgs(
            iterations=self.iterations or 4000,
            learning_rate=self.learning_rate or 1.0,
            history=self.history,
            tolerance=self.tolerance,
            good_enough=self.good_enough,
            patience=self.patience,
            guard=self.guard,
        )
        return minimise(problems, start, lbfgs, enough=enough)


def _left_out(setting: str) -> str:
    """Return what else a setting may be, for a message."""
    optional = {"iterations", "patience", "tolerance", "learning_rate"}
    return ", or left out" if setting in optional else ""
