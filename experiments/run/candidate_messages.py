"""What each candidate would have sent in a row's place: messages of a recorded run, made again.

A forward pass for a smashed row, local training for an update; the whole batch where rows depend on
each other. Beside the candidates' messages stands what was recorded, and what of it was sent in the
clear: a loss, a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from experiments.run.recorded import Recorded
from experiments.run.replay import Sent, bottom_before, refuse_other_steps, refuse_own_protocol
from experiments.run.targets import Evidences
from leakbed.contracts import Defense, Protects, select
from leakbed.contracts.noise_laws import (
    Clean,
    Law,
    NoCeilingError,
    floating,
    sent_law,
    weighted_sum,
)
from leakbed.events import Arrays, Bottom, Phase, SmashedUp, Target, UpdateUp
from leakbed.models import DETERMINISTIC
from leakbed.models.networks import FlattenLinear
from leakbed.oracle.caps import reconstruction_floor
from leakbed.oracle.local_training import LocalTraining
from leakbed.oracle.messages import Messages, flat
from leakbed.seeds import derive, scoped

_MEMORY = 2**33  # bytes of candidates' messages, with room for what is computed from them


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One message of a run.

    Attributes:
        target: Where it stands.
        messages: Of all candidates; the truth is the first.
        seen: What was recorded.
        clear: What of it was sent in the clear.
        floor: As for :class:`~experiments.run.ceiling_results.Message`.
        of_bottom: Whether it is a bottom, which the server's seat is not granted.
    """

    target: Target
    messages: Messages
    seen: Float[Tensor, " 1 entries"]
    clear: Float[Tensor, " 1 columns"]
    floor: float | None = None
    of_bottom: bool = False


class CandidateMessages:
    """A recorded run's messages, made again for candidates."""

    def __init__(self, run: Recorded, evidences: Evidences, *, told: bool, summed: bool) -> None:
        """Make nothing yet.

        Args:
            run: The recorded run.
            evidences: Messages of the attacked round.
            told: Whether the guesser is told the row's label where no message tells it.
            summed: Whether the server is given the sum of a round's updates alone.

        Attributes:
            losses: Whether a loss was beside an update that was made again.

        Raises:
            NoCeilingError: If nodes hold strips of images.
        """
        if run.key.parties > 1:
            raise NoCeilingError("there is no ceiling yet for nodes that hold strips of images")
        self.losses = False
        self._run, self._evidences = run, evidences
        self._told, self._summed = told, summed
        self._others: dict[int, Law] = {}
        self._bottoms: dict[tuple[Any, ...], nn.Module] = {}

    def update(self, target: Target, row: int, chosen: Int[Tensor, " candidates"]) -> Part:
        """Return one update as candidates in a row's place would send it.

        Args:
            target: Of an update.
            row: Of the node's, behind it.
            chosen: The row and those that take its place.

        Returns:
            The message.
        """
        key, event = self._run.key, self._update_event(target)
        self._refuse_memory(len(chosen), sum(a.size for a in event.before.values()))
        laws, losses = self._laws(target, event, row, chosen)
        seen = _flat(event.after, _names(laws[0]))
        if self._summed:
            laws, seen = self._sums(target, laws)
        messages, clear = Messages.of(laws), torch.zeros(1, 0, dtype=torch.float64)
        if event.train_loss is not None:
            messages = messages.beside(losses)
            clear = torch.tensor([[event.train_loss]], dtype=torch.float64)
        if self._told:
            labels = key.labels[chosen]
            messages, clear = _beside_label(messages, clear, labels, own=labels[0])
        self.losses |= event.train_loss is not None
        return Part(target=target, messages=messages, seen=seen.unsqueeze(0), clear=clear)

    def row(self, target: Target, chosen: Int[Tensor, " candidates"]) -> Part:
        """Return one smashed row as candidates would send it; the batch, where rows mix.

        Args:
            target: Of a smashed row.
            chosen: The row and those that take its place.

        Returns:
            The message.
        """
        key, event = self._run.key, self._event(target)
        testing = target.phase == Phase.EVALUATE
        images, labels = (key.test_images, key.test_labels) if testing else (key.images, key.labels)
        bottom, floor = self._bottom(target), None
        smashed = torch.from_numpy(event.smashed)
        alone = testing or (_by_row(bottom) and self._once(target))
        alone = alone and all(each.row_wise for each in self._of_smashed())
        self._refuse_memory(len(chosen), (smashed[0] if alone else smashed).numel())
        if alone:
            messages = self._alone(bottom, images[chosen])
            floor = _floor(bottom, images[chosen], messages)
            seen = smashed[[int(target.row or 0)]].flatten(1)
        else:
            messages = self._whole(bottom, target, images, chosen)
            seen = smashed.reshape(1, -1)
        clear = torch.zeros(1, 0, dtype=torch.float64)
        if not testing:
            messages, clear = self._labelled(messages, labels[chosen], event, target)
        elif self._told:
            messages, clear = _beside_label(messages, clear, labels[chosen], own=labels[chosen[0]])
        return Part(target=target, messages=messages, seen=seen, clear=clear, floor=floor)

    def batch(self, target: Target, sent: Sent, chosen: Int[Tensor, " candidates"]) -> Part:
        """Return a smashed batch from a row's own on; a label is in the clear beside the row alone.

        Args:
            target: Of the row.
            sent: Its batch, or a later one, or a bottom.
            chosen: The row and those that take its place.

        Returns:
            The message.
        """
        event, messages = sent.event, Messages.of(sent.laws)
        self._refuse_memory(len(chosen), messages.means.shape[1])
        clear = torch.zeros(1, 0, dtype=torch.float64)
        if isinstance(event, Bottom):
            at = replace(target, node=event.node, round=event.round)
            seen = _flat(event.arrays, _names(sent.laws[0])).unsqueeze(0)
            return Part(target=at, messages=messages, seen=seen, clear=clear, of_bottom=True)
        seen = torch.from_numpy(event.smashed)
        place = {"node": event.node, "round": event.round, "step": event.step}
        at = replace(target, **place, phase=event.phase)
        if at == target:
            labels = self._run.key.labels[chosen]
            messages, clear = self._labelled(messages, labels, event, target)
        return Part(target=at, messages=messages, seen=seen.reshape(1, -1), clear=clear)

    def uses(self, target: Target, row: int) -> list[Target]:
        """Return the node's updates of all rounds in which it used a row.

        Args:
            target: Any of them.
            row: Of the node's.

        Returns:
            In the order of rounds.

        Raises:
            NoCeilingError: If the trace does not hold one of them.
        """
        found = []
        for round_ in range(1, int(self._run.trace.about["rounds"]) + 1):
            at = replace(target, round=round_)
            if row not in self.rows_behind(at):
                continue
            updates = list(self._run.trace.events(UpdateUp, round_=round_))
            if not updates:
                raise NoCeilingError(
                    f"the trace does not hold round {round_}, in which the row was used; record "
                    "the run with keep_rounds = 'all'"
                )
            if any(each.node == target.node for each in updates):  # else it was not asked
                found.append(at)
        return found

    def rows_behind(self, target: Target) -> list[int]:
        """Return the rows that a message was made of, each once.

        Args:
            target: Where it stands.

        Returns:
            Of the node's rows; of test rows by their place.

        Raises:
            NoCeilingError: If the answer key does not know the batch behind it.
        """
        if target.phase == Phase.EVALUATE:
            return [target.step + int(target.row or 0)]
        batches = self.batches(target)
        if target.row is not None:
            if target.step >= len(batches) or target.row >= len(batches[target.step]):
                raise NoCeilingError(
                    f"the answer key knows no row {target.row} of step {target.step} of node "
                    f"{target.node} in round {target.round}: it holds {len(batches)} batches there"
                )
            return [batches[target.step][target.row]]
        return list(dict.fromkeys(row for batch in batches for row in batch))

    def _update_event(self, target: Target) -> UpdateUp:
        own = [e for e in self._evidences.updates if e.node == target.node]
        if not own or own[0].round != target.round:
            updates = self._run.trace.events(UpdateUp, round_=target.round)
            own = [e for e in updates if isinstance(e, UpdateUp) and e.node == target.node]
        if len(own) != 1:
            raise NoCeilingError(
                f"no ceiling: the trace holds {len(own)} updates of node {target.node} in round "
                f"{target.round}; a guesser who reads them all is not repeated here"
            )
        return own[0]

    def _laws(
        self, target: Target, event: UpdateUp, row: int, chosen: Tensor
    ) -> tuple[list[Law], Tensor]:
        """Return the laws of a node's update, and its losses, with candidates in a row's place."""
        run, key = self._run, self._run.key
        refuse_other_steps(run.defenses)
        refuse_own_protocol(run.trace.about)
        before = {name: torch.from_numpy(value) for name, value in event.before.items()}
        network = run.architecture.build(0)
        self._refuse_names(before, network.state_dict())
        stream = run.node_stream(event.node)
        training = LocalTraining(
            network=network,
            before={name: before[name] for name in network.state_dict()},
            batches=[torch.tensor(rows) for rows in self.batches(target)],
            images=key.images,
            labels=key.labels,
            optimiser=run.plan.optimiser,
            stream=None if stream is None else derive(stream, f"train/{target.round}"),
        )
        made, losses = training.of(row, chosen)
        laws = [
            sent_law(run.defenses, Clean(kind=Protects.UPDATE, arrays=floating(one), before=before))
            for one in made
        ]
        return laws, losses

    def _sums(self, target: Target, own: Sequence[Law]) -> tuple[list[Law], Tensor]:
        """Return the laws of the round's weighted sum, and the sum that was recorded."""
        events = self._evidences.updates
        total = sum(int(event.examples or 0) for event in events)
        if not all(event.examples for event in events):
            raise NoCeilingError(
                "no ceiling: a node of this round does not say how many samples it trained on, by "
                "which the sum is weighted"
            )
        shares = {event.node: int(event.examples or 0) / total for event in events}
        for event in events:
            if event.node != target.node and event.node not in self._others:
                other = replace(target, node=event.node)
                row = self.rows_behind(other)[0]
                (law,), _ = self._laws(other, event, row, torch.tensor([row]))
                self._others[event.node] = law
        others = [(shares[n], law) for n, law in self._others.items() if n != target.node]
        laws = [weighted_sum([(shares[target.node], law), *others]) for law in own]
        names = _names(own[0])
        seen = sum(
            (shares[event.node] * _flat(event.after, names).double() for event in events),
            start=torch.zeros((), dtype=torch.float64),
        )
        return laws, seen.float()

    def _once(self, target: Target) -> bool:
        """Say whether a row is in its batch once; two passes can meet in one."""
        (own,) = self.rows_behind(target)
        return self.batches(target)[target.step].count(own) == 1

    def _bottom(self, target: Target) -> nn.Module:
        """Return the bottom of a message; rows of one batch share it, and so do all test rows."""
        testing = target.phase == Phase.EVALUATE
        place = (target.round,) if testing else (target.round, target.node, target.step)
        if place not in self._bottoms:
            self._bottoms[place] = bottom_before(self._run, target)
        return self._bottoms[place]

    def _alone(self, bottom: nn.Module, images: Tensor) -> Messages:
        with torch.no_grad():
            made = torch.cat([bottom(part) for part in images.split(256)])
        kind = Protects.SMASHED
        law = sent_law(self._of_smashed(), Clean(kind=kind, arrays={kind: made}))
        return Messages.of_rows(law)

    def _whole(self, bottom: nn.Module, target: Target, images: Tensor, chosen: Tensor) -> Messages:
        """The whole batch is the message: its rows mix, or one is in it twice."""
        if target.phase == Phase.EVALUATE:
            rows = torch.arange(len(self._event(target).smashed)) + target.step
        else:
            rows = torch.tensor(self._run.key.order[target.node, target.round, target.step])
        here = rows == rows[int(target.row or 0)]
        stream = self._run.node_stream(target.node)
        place = f"forward/{target.round}/{target.step}"
        kept = {name: value.clone() for name, value in bottom.state_dict().items()}
        kind, laws = Protects.SMASHED, []
        for candidate in chosen.tolist():
            rows[here] = candidate
            with torch.no_grad(), scoped(derive(stream or 0, place)):
                made = bottom(images[rows])
            bottom.load_state_dict(kept)  # BatchNorm counts every batch
            laws.append(sent_law(self._of_smashed(), Clean(kind=kind, arrays={kind: made})))
        one = int(here.sum()) == 1 and all(each.row_wise for each in self._of_smashed())
        messages = Messages.of(laws)
        return messages if one else replace(messages, radius=None)

    def _of_smashed(self) -> tuple[Defense, ...]:
        return select(self._run.defenses, Protects.SMASHED)

    def _labelled(
        self, messages: Messages, labels: Tensor, event: SmashedUp, target: Target
    ) -> tuple[Messages, Tensor]:
        """Labels travel beside the row, or lie at the server: others are impossible.

        A U-shaped node's gradient at the upper cut is a function of the features, which the server
        made of the smashed row itself, and of the label: beside the row it tells the label alone.
        """
        at_node = self._run.plan.labels == "client"
        hides = {Protects.LABELS, Protects.CUT_GRADIENT} if at_node else {Protects.LABELS}
        if select(self._run.defenses, *hides):
            raise NoCeilingError(
                "no ceiling: what tells the labels beside these rows is noised, and the law of "
                "both together is not known here; attack test rows (when = 'inference')"
            )
        row = int(target.row or 0)
        sent = labels[0] if event.labels is None else torch.as_tensor(event.labels[row])
        return _beside_label(messages, torch.zeros(1, 0), labels, own=sent)

    def batches(self, target: Target) -> list[list[int]]:
        """Return the rows of each of a node's batches in a round.

        Args:
            target: In that round.

        Returns:
            Of the node's rows.

        Raises:
            NoCeilingError: If the answer key knows none.
        """
        order = self._run.key.order
        found: list[list[int]] = []
        while (target.node, target.round, len(found)) in order:
            found.append(list(map(int, order[target.node, target.round, len(found)])))
        if not found:
            raise NoCeilingError(
                f"the answer key knows no batch of node {target.node} in round {target.round}"
            )
        return found

    def _event(self, target: Target) -> SmashedUp:
        if target.phase == Phase.EVALUATE:
            return next(
                each
                for each in self._evidences.evaluated
                if (each.node, each.step) == (target.node, target.step)
            )
        return self._evidences.smashed[target.node, target.step]

    def _refuse_memory(self, candidates: int, entries: int) -> None:
        if candidates * entries * 4 > _MEMORY:
            raise NoCeilingError(
                f"{candidates} candidates' messages of {entries} numbers are "
                f"{candidates * entries * 4 / 2**30:.1f} GiB, more than {_MEMORY / 2**30:.0f}; ask "
                f"for at most {_MEMORY // (4 * entries)} candidates"
            )

    @staticmethod
    def _refuse_names(before: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        for name, value in own.items():
            if name not in before or before[name].shape != value.shape:
                seen = tuple(before[name].shape) if name in before else "missing"
                raise NoCeilingError(
                    f"the recorded weights are of another model: {name!r} is {seen}, the trace's "
                    f"architecture has {tuple(value.shape)}; another version may have recorded it"
                )


def _beside_label(
    messages: Messages, clear: Tensor, labels: Tensor, *, own: Tensor
) -> tuple[Messages, Tensor]:
    """Return messages, and what is in the clear beside the recorded one, with the row's label."""
    return messages.beside(labels), torch.cat([clear, own.double().reshape(1, 1)], 1)


def _by_row(bottom: nn.Module) -> bool:
    """Say whether a row's smashed data depend on that row alone: no BatchNorm, no draws."""
    mixing = (nn.modules.batchnorm._BatchNorm,)  # noqa: SLF001  torch has no public name for it
    return all(
        type(layer) in DETERMINISTIC and not (isinstance(layer, mixing) and layer.training)
        for layer in bottom.modules()
    )


def _flat(arrays: Arrays, names: Sequence[str]) -> Float[Tensor, " entries"]:
    return flat({name: torch.from_numpy(arrays[name]) for name in names})


def _names(law: Law) -> list[str]:
    return list(getattr(law, "mean", {}))


_LINEAR = (
    FlattenLinear,
    nn.AvgPool2d,
    nn.Conv2d,
    nn.Flatten,
    nn.Identity,
    nn.Linear,
    nn.Sequential,
)


def _floor(bottom: nn.Module, images: Tensor, messages: Messages) -> float | None:
    """Return what no linear reconstruction is under; None where the bottom is not linear."""
    linear = all(type(layer) in _LINEAR for layer in bottom.modules())
    if not linear or messages.radius is not None or not messages.equal_noise:
        return None
    return reconstruction_floor(images, messages.means, float(messages.scales[0, 0]))
