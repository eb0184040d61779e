"""The adversary of a training run: begun before it, measured during it, asked after it.

The adversary stands at the wiretap, as :mod:`leakbed.hijack` puts it there: an active one in the
place of its active hook, a watcher among the hooks that can change nothing. The harness, which
knows which private rows a smashed batch hides, measures every so many batches what the adversary
could decode by then; after the run the adversary decodes what it saw last. Neither draws from a
generator of the training, and the adversary never sees a truth.

A passive attack is run on a trace, unless it learns live; an adversary, or one that did, has
answered by the end of training, and its answers to the targets are picked here.
"""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attacks import ADVERSARIES, ATTACKS
from experiments.run.alarms import timed
from experiments.run.attack import Attacked, Cell, met
from experiments.run.prepare import Prepared, answer_key
from experiments.run.server_part import Mirror, layers
from experiments.run.targets import Evidences, pick_targets
from experiments.run.training_run import DECODED, TrainingRun
from experiments.run.view import initial_view
from experiments.settings.cells import Hijacking
from experiments.settings.plugins import JsonObject
from leakbed.contracts import Adversary, Guess, Knowledge, Watcher
from leakbed.events import CutGradientDown, Event, Phase, SmashedUp, Target
from leakbed.hijack import Hijack, HijackError, Watch
from leakbed.objects import steady
from leakbed.oracle import score
from leakbed.plugins import picked
from leakbed.tap.trace import Trace
from leakbed.tensors import resolve_device
from strategies.split_strategy import SplitStrategy

GUESSED = ("images", "labels", "attributes")
FIELDS = (*GUESSED, "failed")
"""What of a guess is kept."""
METRICS = ("mse", "ssim", "abs_pearson", "identification", "label_accuracy", "attribute_accuracy")
"""What a checkpoint measures, as far as the adversary guesses it."""


class LiveAdversary:
    """A hook of one training run, active or passive, with what the harness records beside it.

    Attributes:
        forges: Whether it is the active hook; else what it returns is ignored.
        checkpoints: Scores of the batch of every so many forged or watched gradients, by metric,
            with their number by then (``step``).
        seconds: Time the adversary has taken.
        watching: Time the harness has taken for the checkpoints.
    """

    def __init__(self, prepared: Prepared, chosen: Hijacking) -> None:
        """Let the adversary begin; what it refuses, it refuses before anything is trained."""
        self.forges = not chosen.watches
        self.checkpoints: list[dict[str, float]] = []
        self.seconds = self.watching = 0.0
        self._chosen = chosen
        self._answers = answer_key(prepared, None)
        self._seen: dict[tuple[int, int, int], Tensor] = {}
        self._forged: dict[int, list[int]] = {}
        self._latest: tuple[Tensor, tuple[int, int, int]] | None = None
        self._strategy: SplitStrategy | None = None
        adversary = make_adversary(chosen)
        device = resolve_device(prepared.settings.device)
        first = None
        if Knowledge.SERVER_PART in adversary.threat.needs:
            first = layers(prepared.architecture, stream=prepared.stream("victim-init")).to(device)
        view = initial_view(
            adversary.threat,
            prepared.architecture,
            rows=prepared.plan.batch_size,
            public=prepared.public,
            device=device,
            classes=prepared.data.dataset().classes,
            part=first,
        )
        stream = prepared.stream(f"adversary/{steady(chosen.name)}")
        self._hook: Hijack[Any] | Watch[Any]
        if isinstance(adversary, Watcher):
            part = Mirror(prepared.architecture, self._module_of, device=device)
            self._hook = Watch(adversary, view, seed=stream, part=part)
        else:
            self._hook = Hijack(adversary, view, seed=stream)

    def stands_beside(self, strategy: SplitStrategy) -> None:
        """Let a watcher look at the server's part of a strategy from now on.

        Args:
            strategy: The run's, before it starts.
        """
        self._strategy = strategy

    def _module_of(self, node: int) -> nn.Module:
        if self._strategy is None:
            raise HijackError("no strategy was given to watch; call stands_beside before training")
        return self._strategy.module_of(node)

    def __call__(self, event: Event) -> Event | None:
        """Show the adversary an event, and return what goes on in its place.

        Args:
            event: From the wiretap.

        Returns:
            The forged event; None for what passes unchanged, as everything does in a control run
            and beside a watcher.
        """
        started, place = perf_counter(), (event.node, event.round, event.step)
        if isinstance(event, SmashedUp) and event.phase == Phase.TRAIN:
            self._seen[place] = torch.from_numpy(event.smashed)
        sent = self._hook(event)
        self.seconds += perf_counter() - started
        if isinstance(event, CutGradientDown):
            smashed = self._seen.pop(place)
            self._forged.setdefault(event.node, []).append(self._hook.iteration)
            self._latest = smashed, place
            if self._hook.iteration % self._chosen.checkpoint_every == 0:
                self._measure(smashed, place)
        return sent if self._chosen.forges else None

    def concluded(self, summary: JsonObject, work: Path) -> JsonObject:
        """Decode what was seen last, and return the run's summary with what the adversary took.

        Args:
            summary: Of the training.
            work: The run's folder, with its trace; what is decoded is written there.

        Returns:
            Utility, cost and checkpoints, and where among all gradients alarms were raised;
            of a run that a node stopped also a checkpoint of the very end.
        """
        if summary["detection"].get("stopped"):
            self._measure_the_end()
        started = perf_counter()
        save_file(self._decoded(work / "trace"), work / DECODED)
        (work / DECODED).chmod(0o600)
        self.seconds += perf_counter() - started
        cost = {
            **summary["cost"],
            "seconds": summary["cost"]["seconds"] - self.watching,
            "adversary_seconds": self.seconds,
        }
        hijacked = self._chosen.forges
        detection = timed(summary["detection"], self._forged, hijacked=hijacked)
        return {**summary, "cost": cost, "checkpoints": self.checkpoints, "detection": detection}

    def _decoded(self, folder: Path) -> dict[str, Tensor]:
        """Return what the adversary makes of the smashed data of a trace's last round."""
        trace = Trace(folder)
        last = max((int(record.fields.get("round", 0)) for record in trace.records), default=0)
        tensors: dict[str, Tensor] = {}
        for event in trace.events(SmashedUp, round_=last):
            if isinstance(event, SmashedUp):
                guess = self._hook.guess(torch.from_numpy(event.smashed))
                tensors |= _kept(guess, place_of(event.phase, event.node, event.step))
        return tensors

    def _measure_the_end(self) -> None:
        """Add a checkpoint of the last gradient, where it has none."""
        measured = self.checkpoints[-1]["step"] if self.checkpoints else 0
        if self._latest is not None and measured < self._hook.iteration:
            self._measure(*self._latest)

    def _measure(self, smashed: Tensor, place: tuple[int, int, int]) -> None:
        """Score what the adversary makes of one training batch by now."""
        started = perf_counter()
        node, round_, step = place
        targets = [
            Target(node=node, round=round_, step=step, row=row, phase=Phase.TRAIN)
            for row in range(len(smashed))
        ]
        guess = self._hook.guess(smashed)
        own: dict[str, Any] = {name: _on_cpu(getattr(guess, name)) for name in GUESSED}
        infers = self._hook.adversary.threat.infers
        means = score(Guess(**own), self._answers.truth(targets, attribute=infers)).means()
        found = {name: means[name] for name in METRICS if name in means}
        self.checkpoints.append({"step": self._hook.iteration, **found})
        self.watching += perf_counter() - started


def make_adversary(chosen: Hijacking) -> Adversary[Any] | Watcher[Any]:
    """Return an adversary or a watcher with its settings; bad values raise its own errors.

    Args:
        chosen: Its catalogue key or import path, and settings.

    Returns:
        The adversary, or the watcher.
    """
    catalogue: dict[str, type[Any]] = {**ADVERSARIES, **ATTACKS}
    made: Adversary[Any] | Watcher[Any] = picked(chosen.name, catalogue, "attack")(**chosen.own)
    return made


def place_of(phase: Phase, node: int, step: int) -> str:
    """Return under which name a decoded batch is kept, its field excepted."""
    return f"{phase}/{node}/{step}"


def _kept(guess: Guess, place: str) -> dict[str, Tensor]:
    found = {f"{place}/{name}": _on_cpu(getattr(guess, name)) for name in FIELDS}
    return {name: each.contiguous() for name, each in found.items() if each is not None}


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu()


def decoded_attack(run: TrainingRun, cell: Cell) -> Attacked:
    """Return the answers of an adversary, or of a watcher, to its targets.

    A run without the smashed data asked for raises :class:`~experiments.run.targets.MisfitError`.

    Args:
        run: Trained with the adversary.
        cell: The adversary's, with which targets and how many.

    Returns:
        The answers, in the targets' order.
    """
    trace = Trace(run.trace)
    evidences = Evidences.of(trace)
    when, count = cell.settings.attack.when, cell.settings.attack.targets
    targets = pick_targets(evidences, cell.attack.threat, when=when, count=count)
    exposed, notes = met(trace, evidences, targets, asked=count)
    found = _picked(run, targets)
    return Attacked(
        attack=cell.attack,
        targets=targets,
        guess=Guess(
            images=found.get("images"),
            labels=found.get("labels"),
            attributes=found.get("attributes"),
            failed=found.get("failed"),
        ),
        seconds=float(run.cost.get("adversary_seconds", 0.0)),
        exposure=exposed,
        notes=notes,
    )


def _picked(run: TrainingRun, targets: Sequence[Target]) -> dict[str, Tensor]:
    """Return the targets' rows of every field that was guessed."""
    rows: dict[str, list[Tensor]] = {}
    with safe_open(run.decoded, framework="pt") as file:
        names = set(file.keys())
        for target in targets:
            place = place_of(target.phase, target.node, target.step)
            for field in FIELDS:
                if f"{place}/{field}" in names:
                    row = file.get_slice(f"{place}/{field}")[int(target.row or 0)]
                    rows.setdefault(field, []).append(row)
    return {field: torch.stack(each) for field, each in rows.items()}
