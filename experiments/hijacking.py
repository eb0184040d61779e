"""The active adversary of a training run: begun before it, watched during it, asked after it.

The adversary stands at the wiretap, as :mod:`leakbed.hijack` puts it there. The harness, which
knows which private rows a smashed batch hides, measures every so many forged gradients what the
adversary could decode by then; after the run the adversary decodes what it saw last. Neither draws
from a generator of the training, and the adversary never sees a truth.
"""

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from attacks import ADVERSARIES
from experiments.cells import Hijacking
from experiments.detecting import timed
from experiments.preparing import Prepared, answer_key
from experiments.run_folder import DECODED
from experiments.settings import JsonObject
from leakbed.contracts import Adversary, Guess
from leakbed.events import CutGradientDown, Event, Phase, SmashedUp
from leakbed.hijack import Hijack
from leakbed.models import resolve_device
from leakbed.opening import opening_view
from leakbed.oracle import score
from leakbed.targets import Target
from leakbed.trace import Trace

FIELDS = ("images", "labels", "failed")
"""What of a guess is kept."""
METRICS = ("mse", "ssim", "abs_pearson", "identification", "label_accuracy")
"""What a checkpoint measures, as far as the adversary guesses it."""


class ActiveRun:
    """The active hook of one training run, with what the harness records beside it.

    Attributes:
        checkpoints: Scores of the batch of every so many forged gradients, by metric, with the
            number of gradients forged by then (``step``).
        seconds: Time the adversary has taken.
        watching: Time the harness has taken for the checkpoints.
    """

    def __init__(self, prepared: Prepared, chosen: Hijacking) -> None:
        """Let the adversary begin; what it refuses, it refuses before anything is trained.

        Args:
            prepared: The run.
            chosen: Its adversary.
        """
        self.checkpoints: list[dict[str, float]] = []
        self.seconds = self.watching = 0.0
        self._chosen = chosen
        self._answers = answer_key(prepared, None)
        self._seen: dict[tuple[int, int, int], Tensor] = {}
        self._forged: dict[int, list[int]] = {}
        self._latest: tuple[Tensor, tuple[int, int, int]] | None = None
        adversary = make_adversary(chosen.name, chosen.own)
        view = opening_view(
            adversary.threat,
            prepared.architecture,
            rows=prepared.plan.batch_size,
            public=prepared.public,
            device=resolve_device(prepared.settings.device),
        )
        stream = prepared.stream(f"adversary/{chosen.name}")
        self._hijack = Hijack(adversary, view, seed=stream)

    def __call__(self, event: Event) -> Event | None:
        """Show the adversary an event, and return what goes on in its place.

        Args:
            event: From the wiretap.

        Returns:
            The forged event; None for what passes unchanged, as everything does in a control run.
        """
        started, place = perf_counter(), (event.node, event.round, event.step)
        if isinstance(event, SmashedUp) and event.phase == Phase.TRAIN:
            self._seen[place] = torch.from_numpy(event.smashed)
        sent = self._hijack(event)
        self.seconds += perf_counter() - started
        if isinstance(event, CutGradientDown):
            smashed = self._seen.pop(place)
            self._forged.setdefault(event.node, []).append(self._hijack.iteration)
            self._latest = smashed, place
            if self._hijack.iteration % self._chosen.checkpoint_every == 0:
                self._measure(smashed, place)
        return sent if self._chosen.forges else None

    def concluded(self, summary: JsonObject, work: Path) -> JsonObject:
        """Decode what was seen last, and return the run's summary with what the hijack took.

        Args:
            summary: Of the training.
            work: The run's folder, with its trace; what is decoded is written there.

        Returns:
            Utility, cost and checkpoints, and where among the forged gradients alarms were raised;
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
                guess = self._hijack.guess(torch.from_numpy(event.smashed))
                tensors |= _kept(guess, place_of(event.phase, event.node, event.step))
        return tensors

    def _measure_the_end(self) -> None:
        """Add a checkpoint of the last gradient, where it has none."""
        measured = self.checkpoints[-1]["step"] if self.checkpoints else 0
        if self._latest is not None and measured < self._hijack.iteration:
            self._measure(*self._latest)

    def _measure(self, smashed: Tensor, place: tuple[int, int, int]) -> None:
        """Score what the adversary makes of one training batch by now."""
        started = perf_counter()
        node, round_, step = place
        targets = [
            Target(node=node, round=round_, step=step, row=row, phase=Phase.TRAIN)
            for row in range(len(smashed))
        ]
        guess = self._hijack.guess(smashed)
        own = Guess(images=_on_cpu(guess.images), labels=_on_cpu(guess.labels))
        means = score(own, self._answers.truth(targets)).means()
        found = {name: means[name] for name in METRICS if name in means}
        self.checkpoints.append({"step": self._hijack.iteration, **found})
        self.watching += perf_counter() - started


def make_adversary(name: str, own: Mapping[str, Any]) -> Adversary[Any]:
    """Return an adversary with its settings; values out of range raise its own errors.

    Args:
        name: Its catalogue key.
        own: Its settings.

    Returns:
        The adversary.
    """
    made: Adversary[Any] = ADVERSARIES[name](**own)
    return made


def place_of(phase: Phase, node: int, step: int) -> str:
    """Return under which name a decoded batch is kept, its field excepted."""
    return f"{phase}/{node}/{step}"


def _kept(guess: Guess, place: str) -> dict[str, Tensor]:
    found = {f"{place}/{name}": _on_cpu(getattr(guess, name)) for name in FIELDS}
    return {name: each.contiguous() for name, each in found.items() if each is not None}


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu()
