"""A node's bottom as it was before a message: stepped again with the recorded cut gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from experiments.run.recorded import Recorded
from leakbed.contracts import Defense, Protects, select
from leakbed.contracts.noise_laws import Channel, Clean, Law, NoCeilingError, sent_law, together
from leakbed.events import Array, CutGradientDown, Phase, SmashedUp, Target
from leakbed.plugins import is_own
from leakbed.seeds import derive, scoped
from leakbed.tensors import as_tensor, load
from strategies import find_protocol
from strategies.averaging import average

_SMASHED = Protects.SMASHED


def bottom_before(run: Recorded, target: Target) -> nn.Module:
    """Return the bottom that made a smashed batch.

    Args:
        run: The recorded run.
        target: One of its smashed rows.

    Returns:
        In the mode it had: of evaluation for test rows, else of training.

    Raises:
        NoCeilingError: If the trace does not hold what it was trained with.
    """
    bottom = run.architecture.bottom(0)
    if target.phase == Phase.EVALUATE:
        last = run.trace.about.get("rounds")
        if run.key.bottom is None or target.round != last:
            raise NoCeilingError(
                f"the answer key holds the bottom of the last round ({last}) alone; ask for that "
                f"round rather than {target.round}"
            )
        load(bottom, {name: run.key.bottom[name] for name in bottom.state_dict()})
        return bottom.eval()
    return _Replay(run, target).reached[0]


def refuse_other_steps(defenses: Sequence[Defense], *, instead: str = "") -> None:
    """Refuse to repeat training in which defences took part.

    Args:
        defenses: Of the run.
        instead: What to do, if anything.

    Raises:
        NoCeilingError: If one hooks into training.
    """
    if select(defenses, Protects.TRAINING):
        raise NoCeilingError(
            f"no ceiling: a defence changes the node's own training steps{instead}"
        )


def following(
    run: Recorded, target: Target, candidates: Int[Tensor, " candidates"]
) -> tuple[list[Law], Float[Tensor, " entries"]]:
    """Return what candidates would send from a row's message to the end of the round.

    Every candidate has a bottom and an optimiser of its own, stepped with the recorded gradients.

    Args:
        run: The recorded run.
        target: One of its smashed rows, of training.
        candidates: Rows of the answer key's images that take its place.

    Returns:
        The law of the node's messages together, for each candidate; and what was recorded.
    """
    bottom, optimiser = _Replay(run, target).reached
    events = [
        each
        for each in run.trace.events(SmashedUp, CutGradientDown, round_=target.round)
        if each.node == target.node and each.step >= target.step
    ]
    batches = sorted(
        (e for e in events if isinstance(e, SmashedUp) and e.phase == Phase.TRAIN),
        key=lambda event: event.step,
    )
    gradients = {e.step: e.gradient for e in events if isinstance(e, CutGradientDown)}
    order, place = run.key.order, (target.node, target.round)
    own = order[*place, target.step][int(target.row or 0)]
    laws: list[Law] = []
    for candidate in candidates.tolist():
        mine, kept = copy.deepcopy(bottom), copy.deepcopy(optimiser.state_dict())
        steps = run.plan.optimiser(mine.parameters())
        steps.load_state_dict(kept)
        made = []
        for event in batches:
            rows = torch.tensor(order[*place, event.step])
            rows = torch.where(rows == own, candidate, rows)
            with scoped(_forward(run, target.node, target.round, event.step)):
                smashed = mine(run.key.images[rows])
            clean = Clean(kind=_SMASHED, arrays={_SMASHED: smashed.detach()})
            made.append(sent_law(run.defenses, clean))
            if event.step in gradients and event is not batches[-1]:
                steps.zero_grad()
                _sent(run.defenses, smashed).backward(as_tensor(gradients[event.step]))
                steps.step()
        laws.append(together(made))
    return laws, torch.cat([torch.from_numpy(e.smashed).flatten() for e in batches])


def _forward(run: Recorded, node: int, round_: int, step: int) -> int:
    """Return the stream of a node's forward pass, of which dropout draws."""
    return derive(run.node_stream(node) or 0, f"forward/{round_}/{step}")


class _Replay:
    def __init__(self, run: Recorded, target: Target) -> None:
        if run.key.seed is None:
            raise NoCeilingError("the answer key does not say the run's seed; record it again")
        protocol = str(run.trace.about["protocol"])
        refuse_other_steps(run.defenses, instead="; attack test rows (when = 'inference')")
        self._run, self._target = run, target
        entry = find_protocol(protocol)
        in_step = "sync" in entry.options and run.key.training.get("sync") != "round"
        self._merged = entry.merges and not in_step
        # Of a protocol of one's own nobody knows here how its bottoms step.
        known = not is_own(protocol) and (self._merged or entry.in_turn)
        if not known and (target.round, target.step) != (1, 0):
            raise NoCeilingError(
                f"no ceiling: how bottoms of {protocol!r} step together (protocol.sync = 'step') "
                "is not repeated here; "
                "attack the first message, or test rows (when = 'inference')"
            )
        self._kept: dict[int, dict[str, object]] = {}  # momenta by node
        first = run.architecture.parts(derive(run.key.seed, "victim-init")).bottom
        self._state = {name: value.clone() for name, value in first.state_dict().items()}
        self.reached = self._found()

    def _found(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        for round_ in range(1, self._target.round + 1):
            events = list(self._run.trace.events(SmashedUp, CutGradientDown, round_=round_))
            batches = [e for e in events if isinstance(e, SmashedUp) and e.phase == Phase.TRAIN]
            gradients = {
                (e.node, e.step): e.gradient for e in events if isinstance(e, CutGradientDown)
            }
            if not batches:
                raise NoCeilingError(
                    f"the trace does not hold round {round_}, by which bottoms were trained before "
                    f"round {self._target.round}; record the run with keep_rounds = 'all', or "
                    "attack test rows (when = 'inference')"
                )
            ends: list[tuple[int, dict[str, Tensor]]] = []
            for node in dict.fromkeys(each.node for each in batches):
                own = sorted((e for e in batches if e.node == node), key=lambda e: e.step)
                if (found := self._round(node, round_, own, gradients)) is not None:
                    return found
                ends.append((sum(len(e.smashed) for e in own), self._last))
                if not self._merged:
                    self._state = self._last
            if self._merged:
                counts, states = zip(*ends, strict=True)
                merged = average([{n: v.numpy() for n, v in s.items()} for s in states], counts)
                self._state = {name: torch.tensor(value) for name, value in merged.items()}
        raise NoCeilingError(f"the trace holds no batch of {self._target}")

    def _round(
        self,
        node: int,
        round_: int,
        batches: Sequence[SmashedUp],
        gradients: Mapping[tuple[int, int], Array],
    ) -> tuple[nn.Module, torch.optim.Optimizer] | None:
        """Step one node's bottom through a round; return it if the target is reached."""
        run, target = self._run, self._target
        bottom = run.architecture.bottom(0)
        bottom.load_state_dict(self._state)
        bottom.train()
        optimiser = run.plan.optimiser(bottom.parameters())
        if run.plan.optimizer_state == "kept" and node in self._kept:
            optimiser.load_state_dict(self._kept[node])
        for event in batches:
            if (node, round_, event.step) == (target.node, target.round, target.step):
                return bottom, optimiser
            rows = torch.tensor(run.key.order[node, round_, event.step])
            with scoped(_forward(run, node, round_, event.step)):
                made = bottom(run.key.images[rows])
            optimiser.zero_grad()
            sent = _sent(run.defenses, made)
            sent.backward(as_tensor(gradients[node, event.step]))
            optimiser.step()
        self._kept[node] = optimiser.state_dict()
        self._last = {name: value.clone() for name, value in bottom.state_dict().items()}
        return None


def _sent(defenses: Sequence[Defense], made: Tensor) -> Tensor:
    """Return what is sent but for the noise, with its graph, as nodes learn through defences."""
    kind = _SMASHED
    for defense in defenses:
        if kind not in defense.protects or defense.straight_through:
            continue
        law = sent_law([defense], Clean(kind=kind, arrays={kind: made}))
        made = made if isinstance(law, Channel) else law.mean[kind]
    return made
