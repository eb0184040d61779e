"""The informed ceiling of a recorded run, and the check of its noise.

A run's folder holds the trace, and the answer key with how nodes trained and with which defences.
From them the messages of every candidate are made again: a forward pass for a smashed row, local
training for an update. Bottoms before a training message are stepped again with the recorded cut
gradients, so their whole past must be in the trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from experiments.run.ceiling_results import Message, RunCeiling
from experiments.run.recorded import Recorded
from experiments.run.replay import bottom_before, following, refuse_other_steps
from experiments.run.targets import Evidences, pick_targets
from leakbed.contracts import Defense, Evidence, Protects, Seat, ThreatModel, select
from leakbed.contracts.noise_laws import (
    Channel,
    Clean,
    Law,
    NoCeilingError,
    cap,
    floating,
    of_answers,
    sent_law,
    weighted_sum,
)
from leakbed.events import Phase, SmashedUp, Target, UpdateUp
from leakbed.models import DETERMINISTIC
from leakbed.oracle.ceiling import Messages, beliefs, ceiling, flat, label_ceiling
from leakbed.oracle.local_training import LocalTraining
from leakbed.oracle.noise_checks import Finding, check_hits, check_noise
from leakbed.seeds import derive, generator, scoped

_MEMORY = 2**33  # bytes of candidates' messages, with room for what is computed from them
_SMASHED = ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.SMASHED}))
_UPDATE = ThreatModel(seat=Seat.SERVER, evidence=frozenset({Evidence.UPDATE}))


def ceiling_of_run(
    run: Path,
    *,
    collect: str | int = "last",
    when: str = "training",
    targets: int = 8,
    candidates: int = 1000,
    draws: int = 4,
    seed: int = 0,
    later: bool = False,
    model: str | None = None,
    labels: bool = False,
    summed: bool = False,
) -> RunCeiling:
    """Return the ceilings of a recorded run's attacked messages.

    Args:
        run: Its folder, with ``trace`` and ``answers``.
        collect: The round: ``"first"``, ``"middle"``, ``"last"`` or its number.
        when: Of smashed rows: ``"training"`` or ``"inference"``.
        targets: How many messages at most.
        candidates: Among how many rows, or all there are.
        draws: Of the noise, for each candidate.
        seed: Of those draws.
        later: Whether the guesser also reads the node's later messages of the round, which follow
            from weights that the row has moved.
        model: The import path of the network, where the trace names one: permits to import it.
        labels: Whether the guesser is told the row's label where no message tells it: of updates,
            and of test rows.
        summed: Whether the server is given the sum of the round's updates alone, weighted by their
            numbers of samples, as under secure aggregation. A recorded loss is still read.

    Returns:
        They, and what the check of the recorded noise found.

    Raises:
        NoCeilingError: If something is missing without which no number is a bound.
    """
    if candidates < 2 or draws < 1 or targets < 1:  # noqa: PLR2004
        raise NoCeilingError(
            f"got {candidates} candidates, {draws} draws and {targets} messages; give 2, 1 and 1 "
            "at least"
        )
    torch.set_num_threads(1)
    recorded = Recorded.open(run, model=model)
    evidences = Evidences.of(recorded.trace, collect)
    threat = _UPDATE if evidences.updates else _SMASHED
    if summed and not evidences.updates:
        raise NoCeilingError(
            "no ceiling: nodes of this run send smashed rows, which nothing sums; a sum is of "
            "updates, as FedAvg's"
        )
    chosen = pick_targets(evidences, threat, when=when, count=targets)
    game = _Game(
        recorded,
        evidences,
        chosen,
        candidates=candidates,
        draws=draws,
        seed=seed,
        later=later,
        labels=labels,
        summed=summed,
    )
    messages = [game.update(at) if evidences.updates else game.row(at) for at in chosen]
    found = RunCeiling(messages=messages, findings=game.findings(messages), notes=game.notes)
    if summed:
        found = replace(found, seat="server that is given the sum of all nodes' updates alone")
    return replace(found, told=f"{found.told}, the row's label") if labels else found


class _Game:
    def __init__(
        self,
        recorded: Recorded,
        evidences: Evidences,
        targets: Sequence[Target],
        *,
        candidates: int,
        draws: int,
        seed: int,
        later: bool,
        labels: bool,
        summed: bool,
    ) -> None:
        self._following, self._told, self._summed = later, labels, summed
        self._others: dict[int, Law] = {}
        self._run, self._evidences = recorded, evidences
        self.notes = _answered(recorded)
        self._count, self._draws, self._seed = candidates, draws, seed
        known = [replace(targets[0], node=e.node) for e in evidences.updates] if summed else targets
        self._attacked = {row for target in known for row in self._rows_behind(target)}
        self._residuals: list[Tensor] = []
        self._clear: list[bool] = []
        self._checked: set[tuple[Any, ...]] = set()
        self._bottoms: dict[tuple[Any, ...], nn.Module] = {}

    def update(self, target: Target) -> Message:
        """Return the ceiling of one update, for one of the rows behind it."""
        key = self._run.key
        (event,) = [each for each in self._evidences.updates if each.node == target.node]
        behind = self._rows_behind(target)
        place = target.node % len(behind)  # nodes' attacked rows lie at several places of a round
        guesses = len(self._attacked) if self._summed else len(behind)
        chosen = self._candidates(behind[place], len(key.images), guesses=guesses)
        self._refuse_memory(len(chosen), sum(a.size for a in event.before.values()))
        laws, losses = self._laws(target, event, behind[place], chosen)
        seen = _after(event, _names(laws[0]))
        if self._summed:
            laws, seen = self._sums(target, laws)
        messages, clear = Messages.of(laws), torch.zeros(1, 0, dtype=torch.float64)
        if event.train_loss is not None:
            messages = messages.beside(losses)
            clear = torch.tensor([[event.train_loss]], dtype=torch.float64)
        known = key.labels[chosen] if self._told else None
        if known is not None:
            messages, clear = _beside_label(messages, clear, known, own=known[0])
        self._clear.append(event.train_loss is not None)
        return self._message(
            target,
            messages,
            seen.unsqueeze(0),
            clear=clear,
            guesses=guesses,
            place=place,
            labels=known,
        )

    def _laws(
        self, target: Target, event: UpdateUp, row: int, chosen: Tensor
    ) -> tuple[list[Law], Tensor]:
        """Return the laws of a node's update, and its losses, with candidates in a row's place."""
        run, key = self._run, self._run.key
        refuse_other_steps(run.defenses)
        before = {name: torch.from_numpy(value) for name, value in event.before.items()}
        network = run.architecture.build(0)
        self._refuse_names(before, network.state_dict())
        stream = run.node_stream(event.node)
        training = LocalTraining(
            network=network,
            before={name: before[name] for name in network.state_dict()},
            batches=[torch.tensor(rows) for rows in self._batches(target)],
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
                row = self._rows_behind(other)[0]
                (law,), _ = self._laws(other, event, row, torch.tensor([row]))
                self._others[event.node] = law
        others = [(shares[n], law) for n, law in self._others.items() if n != target.node]
        laws = [weighted_sum([(shares[target.node], law), *others]) for law in own]
        names = _names(own[0])
        seen = sum(
            (shares[event.node] * _after(event, names).double() for event in events),
            start=torch.zeros((), dtype=torch.float64),
        )
        return laws, seen.float()

    def row(self, target: Target) -> Message:
        """Return the ceiling of one smashed row."""
        key = self._run.key
        testing = target.phase == Phase.EVALUATE
        images, labels = (key.test_images, key.test_labels) if testing else (key.images, key.labels)
        (own,) = self._rows_behind(target)
        chosen = self._candidates(own, len(images), guesses=1)
        event = self._event(target)
        if self._following and not testing:
            laws, sent = following(self._run, target, chosen)
            messages, clear = self._labelled(Messages.of(laws), labels[chosen], event, target)
            return self._message(
                target,
                messages,
                sent.unsqueeze(0),
                clear=clear,
                guesses=1,
                place=int(target.row or 0),
                labels=labels[chosen],
            )
        bottom = self._bottom(target)
        smashed = torch.from_numpy(event.smashed)
        self._refuse_memory(len(chosen), smashed[0].numel())
        if testing or (_by_row(bottom) and all(each.row_wise for each in self._of_smashed())):
            messages = self._alone(bottom, images[chosen])
            seen = smashed[[int(target.row or 0)]].flatten(1)
        else:
            messages = self._whole(bottom, target, images, chosen)
            seen = smashed.reshape(1, -1)
        clear = torch.zeros(1, 0, dtype=torch.float64)
        if not testing:
            messages, clear = self._labelled(messages, labels[chosen], event, target)
        elif self._told:
            messages, clear = _beside_label(messages, clear, labels[chosen], own=labels[own])
        return self._message(
            target,
            messages,
            seen,
            clear=clear,
            guesses=1,
            place=int(target.row or 0),
            labels=None if testing and not self._told else labels[chosen],
            pool=labels[chosen] if testing and not self._told else None,
        )

    def findings(self, messages: Sequence[Message]) -> list[Finding]:
        """Return what the check of the recorded noise found."""
        found = check_noise(self._residuals) if self._residuals else []
        apart = messages[:1] if self._summed else messages  # those of noise of their own
        hits = check_hits([each.hit for each in apart], [each.single for each in apart])
        if capped := [each for each in messages if each.cap is not None]:
            over = fmean(each.ceiling - float(each.cap or 0) for each in capped)
            error = max(sqrt(sum(each.error**2 for each in capped)) / len(capped), 1e-6)
            found.append(
                Finding(check="ceiling under the claim's cap", z=max(0.0, over / error), limit=3.0)
            )
        if any(self._clear) and any(each.claiming for each in self._run.defenses):
            self.notes.append(
                "A loss travels beside the update in the clear, and a defence that claims "
                "differential privacy does not cover it."
            )
        return [*found, hits]

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
        """Rows depend on each other: the message is the whole batch, made again for each one."""
        rows = torch.tensor(self._run.key.order[target.node, target.round, target.step])
        stream = self._run.node_stream(target.node)
        place = f"forward/{target.round}/{target.step}"
        kept = {name: value.clone() for name, value in bottom.state_dict().items()}
        kind, laws = Protects.SMASHED, []
        for candidate in chosen.tolist():
            rows[int(target.row or 0)] = candidate
            with torch.no_grad(), scoped(derive(stream or 0, place)):
                made = bottom(images[rows])
            bottom.load_state_dict(kept)  # BatchNorm counts every batch
            laws.append(sent_law(self._of_smashed(), Clean(kind=kind, arrays={kind: made})))
        return Messages.of(laws)

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

    def _message(
        self,
        target: Target,
        messages: Messages,
        seen: Float[Tensor, " 1 entries"],
        *,
        clear: Tensor,
        guesses: int,
        place: int,
        labels: Tensor | None = None,
        pool: Tensor | None = None,
    ) -> Message:
        """Return the numbers of one message; the truth is candidate 0.

        ``labels`` of candidates are those in the clear, ``pool`` those that no message tells.
        """
        stream = derive(self._seed, f"ceiling/{target}")
        slow = not messages.equal_noise and messages.family != "fixed"
        truths = torch.arange(min(len(messages), 50)) if slow else None
        found = ceiling(
            messages, guesses=sorted({1, guesses}), draws=self._draws, stream=stream, truths=truths
        )
        told = None
        if pool is not None:
            told, _ = label_ceiling(
                messages, pool, draws=self._draws, stream=derive(stream, "label"), truths=truths
            )
        believed = beliefs(messages, seen, clear=clear)[0]
        self._keep_residual(messages, seen, target)
        mu, best = messages.mu, found[guesses]
        return Message(
            node=target.node,
            round=target.round,
            step=target.step,
            row=place,
            phase=str(target.phase),
            guesses=guesses,
            candidates=len(messages),
            ceiling=best.value,
            error=best.error,
            single=found[1].value,
            named=float(best.records[0]),
            believed=float(believed[0]),
            hit=_hit(believed),
            chance=best.chance,
            norm=None if target.row is None else _norm(messages.means),
            cap=None if mu is None else _cap(mu, guesses, labels, count=len(messages)),
            label=told,
            used_before=self._used_before(target),
        )

    def _keep_residual(self, messages: Messages, seen: Tensor, target: Target) -> None:
        node = None if self._summed else target.node  # one sum, whoever's row is attacked
        place = target.phase, node, target.round, target.step, tuple(seen[0, :8].tolist())
        if messages.family != "normal" or place in self._checked:
            return  # a whole batch is one message, whichever of its rows is attacked
        self._checked.add(place)
        scale = messages.scales[0].repeat_interleave(torch.tensor(messages.sizes))
        self._residuals.append((seen[0].double() - messages.means[0].double()) / scale)

    def _candidates(self, own: int, pool: int, *, guesses: int) -> Int[Tensor, " candidates"]:
        """Return the truth and others that are in no attacked message, in a drawn order."""
        order = torch.randperm(pool, generator=generator(derive(0, "candidates")))
        known = torch.tensor(sorted(self._attacked))
        others = order[~torch.isin(order, known)][: self._count - 1]
        if len(others) + 1 < 2 * guesses:
            raise NoCeilingError(
                f"only {len(others) + 1} rows of {pool} are in no attacked message, for lists of "
                f"{guesses}; a pool hardly larger than a list says nothing: use more data or fewer "
                "messages"
            )
        return torch.cat([torch.tensor([own]), others])

    def _rows_behind(self, target: Target) -> list[int]:
        if target.phase == Phase.EVALUATE:
            return [target.step + int(target.row or 0)]
        batches = self._batches(target)
        if target.row is not None:
            return [batches[target.step][target.row]]
        return list(dict.fromkeys(row for batch in batches for row in batch))

    def _batches(self, target: Target) -> list[list[int]]:
        order = self._run.key.order
        found: list[list[int]] = []
        while (target.node, target.round, len(found)) in order:
            found.append(list(map(int, order[target.node, target.round, len(found)])))
        if not found:
            raise NoCeilingError(
                f"the answer key knows no batch of node {target.node} in round {target.round}"
            )
        return found

    def _used_before(self, target: Target) -> bool:
        if target.phase == Phase.EVALUATE:
            return False
        rows, now = {*self._rows_behind(target)}, (target.round, target.step)
        return any(
            (round_, step) < now and not rows.isdisjoint(batch)
            for (_, round_, step), batch in self._run.key.order.items()
        )

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


def _answered(run: Recorded) -> list[str]:
    """Say what training labels that are answered at random tell by themselves."""
    key, said = run.key, []
    for defense in run.defenses:
        if Protects.LABELS not in defense.protects:
            continue
        law = defense.law(Clean(kind=Protects.LABELS, arrays={}, classes=key.num_classes))
        if isinstance(law, Channel):
            counts = torch.bincount(key.labels, minlength=key.num_classes).double()
            found = of_answers(law, counts / counts.sum())
            said.append(
                f"A training label as {defense.name} answers it is guessed right at most "
                f"{found:.3f} of the time, if it was drawn from the classes' shares whatever the "
                "picture; that bounds no seat that holds the inputs."
            )
    return said


def _norm(rows: Float[Tensor, " candidates entries"]) -> float:
    return float(torch.linalg.vector_norm(rows, dim=1).mean())


def _hit(believed: Float[Tensor, " candidates"]) -> float:
    """Return whether the truth, candidate 0, is the likeliest; among k equals 1 of k."""
    likeliest = believed == believed.max()
    return float(likeliest[0]) / int(likeliest.sum())


def _by_row(bottom: nn.Module) -> bool:
    """Say whether a row's smashed data depend on that row alone: no BatchNorm, no draws."""
    mixing = (nn.modules.batchnorm._BatchNorm,)  # noqa: SLF001  torch has no public name for it
    return all(
        type(layer) in DETERMINISTIC and not (isinstance(layer, mixing) and layer.training)
        for layer in bottom.modules()
    )


def _cap(mu: float, guesses: int, labels: Tensor | None, *, count: int) -> float:
    """Return what a claim allows; labels in the clear leave the candidates of each label alone."""
    groups = [count] if labels is None else labels.unique(return_counts=True)[1].tolist()
    return sum(size / count * cap(mu, chance=min(1.0, guesses / size)) for size in groups)


def _after(event: UpdateUp, names: Sequence[str]) -> Float[Tensor, " entries"]:
    return flat({name: torch.from_numpy(event.after[name]) for name in names})


def _names(law: Law) -> list[str]:
    return list(getattr(law, "mean", {}))
