"""The cells of one training run: trained once, attacked by each, a card for each.

Card fields common to finished, unfit and diverged cells are made here too.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from experiments.results.cards import Card, Threat, peak_memory
from experiments.run.alarms import detected
from experiments.run.attack import Attacked, Cell, answer, keep_answer, kept_answer
from experiments.run.card_ceilings import Bounds
from experiments.run.fit import unfit
from experiments.run.judge import (
    Verdict,
    honest_probe,
    judge,
    judge_samples,
    keep_truth,
    never_hijacked,
    quality,
)
from experiments.run.keys import answer_key_of, score_code, score_key, training_key
from experiments.run.malicious_client import sampled, without_intruder
from experiments.run.malicious_server import decoded_attack
from experiments.run.noise_of_run import noise_of_run
from experiments.run.prepare import Prepared
from experiments.run.train import Grids, NonFiniteError, train
from experiments.run.training_run import TrainingRun
from experiments.settings.cells import CellSettings, Training
from experiments.settings.plugins import JsonObject
from leakbed import __version__
from leakbed.contract_trials import refuse_breaches
from leakbed.contracts import BrokenPluginError, UnfitError
from leakbed.grids.base import NodeFailed
from leakbed.hijack import HijackDivergedError
from leakbed.objects import lent
from leakbed.plugins import is_own, own_class
from leakbed.provenance import RanOn
from leakbed.seeds import derive
from leakbed.tap.trace import Trace
from leakbed.tensors import describe_device, peak_gpu_memory, resolve_device
from strategies import find_protocol


class Progress(Protocol):
    """Who is told how far a run is."""

    def start(self, total: int, *, left_out: int = 0) -> None:
        """Say how many cells there are, and how many were left out as their parts cannot fit."""
        ...

    def advance(self, label: str) -> None:
        """Say that one more cell is done."""
        ...

    def note(self, text: str) -> None:
        """Say what is happening."""
        ...


def card_fields(cell: Cell, key: str) -> dict[str, Any]:
    """Return card fields common to finished, unfit and diverged cells."""
    settings, training = cell.settings, cell.settings.training
    exchanges = find_protocol(training.protocol.name).exchanges
    return {
        "key": key,
        "case": settings.case,
        "demo": settings.demo,
        "protocol": training.protocol.name,
        "data": training.data.name,
        "model": training.model.name,
        "cut": training.model.cut if exchanges == "split" else None,
        "nodes": training.data.nodes,
        "attack": settings.attack.name,
        "defense": training.defense.name,
        "seed": training.seed,
        "threat": Threat.of(cell.attack.threat),
        "tuned_on": settings.attack.model_dump(mode="json")["tuned_on"],
        "settings": settings.as_json(),
        "reported": settings.attack.reported,
        "version": __version__,
        "source": score_code(settings),
    }


def empty_card(
    cell: Cell,
    key: str,
    *,
    status: Literal["unfit", "diverged", "failed"],
    why: str,
) -> Card:
    """Return the card of a cell that came to no result."""
    return Card(**card_fields(cell, key), status=status, why=why)


_SHORT = 2**26  # bytes of a trace that every attack, score and check of a run reads from memory


class RunCleanup:
    """Removes training runs once the last group that may need them is done."""

    def __init__(self, groups: Sequence["TrainingGroup"], *, keep: bool) -> None:
        """Remove nothing yet.

        Args:
            groups: All of an experiment.
            keep: Whether nothing is to be removed.
        """
        self._keep = keep
        self._users = Counter(folder for group in groups for folder in group.runs)

    def after(self, group: "TrainingGroup") -> None:
        """Remove what nobody needs any more: cards, guesses and truths stay."""
        self._users.subtract(group.runs)
        for folder in () if self._keep else group.runs:
            if not self._users[folder]:
                shutil.rmtree(folder, ignore_errors=True)


class DivergedError(RuntimeError):
    """Training left the finite numbers, so that there is nothing to attack."""


class NotKeptError(RuntimeError):
    """What a cell would be scored from is not there; says what is missing."""


class TrainingGroup:
    """The cells of one training run."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        folder: Path,
        grids: Grids,
        progress: Progress | None,
        on_error: Literal["card", "stop"] = "card",
        rescores: bool = False,
        known: Mapping[str, TrainingRun] | None = None,
        checked: dict[Path, tuple[str, ...]] | None = None,
    ) -> None:
        """Train nothing yet.

        Args:
            prepared: The training run.
            folder: For results.
            grids: Where nodes are.
            progress: Told how far it is.
            on_error: What follows where the code of an attack or a defence breaks.
            rescores: Whether to score what is kept alone: nothing is trained, nothing is attacked,
                and a cell that would need it gets no card.
            known: Training runs that are finished and lie elsewhere, by their keys.
            checked: What the check of the noise found, by the folders of training runs; written to.

        Attributes:
            lacking: By the key of a cell's card, why it could not be scored from what is kept.
        """
        self._prepared, self._folder, self._rescores = prepared, folder, rescores
        self.lacking: dict[str, str] = {}
        self._known = dict(known or {})
        self._grids, self._progress = grids, progress
        self._stops = on_error == "stop"
        self._ended: dict[Path, DivergedError | BrokenPluginError] = {}
        self._bounds = Bounds()
        self._noise = {} if checked is None else checked
        self._traces: dict[Path, Trace] = {}

    def keyed(self, group: Sequence[Cell]) -> dict[str, Cell]:
        """Return the cells by the keys of their cards."""
        return {score_key(cell.settings, self._prepared): cell for cell in group}

    def cards(self, keyed: Mapping[str, Cell], done: Mapping[str, Card]) -> Iterator[Card]:
        """Yield a card per cell as it is there; train and attack only for one that is missing.

        Args:
            keyed: From :meth:`keyed`.
            done: Cards that stand; those of these cells are yielded as they are.

        Yields:
            Cards in the order of the cells; who asked for a new one writes it.

        Raises:
            BrokenPluginError: Code of an attack or a defence breaks, and that ends the experiment.
        """
        for key, cell in keyed.items():
            if key in done:
                yield done[key]
                continue
            if why := unfit(cell, self._prepared):
                yield empty_card(cell, key, status="unfit", why=next(iter(why.values())))
                continue
            try:
                trained = self.trained(cell.settings.case)
                card = self._scored(cell, key, trained, *self._answered(cell, trained))
            except NotKeptError as error:
                self.lacking[key] = str(error)
                continue
            except (UnfitError, DivergedError) as error:
                status: Literal["unfit", "diverged"]
                status = "unfit" if isinstance(error, UnfitError) else "diverged"
                card = empty_card(cell, key, status=status, why=str(error))
            except BrokenPluginError as error:
                if self._stops:
                    raise
                card = empty_card(cell, key, status="failed", why=str(error))
            yield card
        self._traces.clear()  # of the next groups of this process there may be hundreds

    @property
    def ran_on(self) -> RanOn:
        """The run's data and the user's code, as this process has them."""
        return self._prepared.ran_on

    @property
    def is_trained(self) -> bool:
        """Whether the training run is there already, finished."""
        return TrainingRun.read(self._run(self._prepared)) is not None

    @property
    def runs(self) -> set[Path]:
        """The folders of the training runs that the cells may need; other groups may as well."""
        own = self._prepared
        honest = own if own.settings.intruder is None else without_intruder(own)
        return {self._run(each) for each in (own, _never_hijacked(own), honest)}

    def _run(self, prepared: Prepared) -> Path:
        return self._folder / "runs" / training_key(prepared)

    def trained(self, case: str, prepared: Prepared | None = None) -> TrainingRun:
        """Return the run of the group, or of its control, trained now if it is not finished."""
        prepared = prepared or self._prepared
        training = prepared.settings
        folder = self._run(prepared)
        if (finished := self._known.get(folder.name) or TrainingRun.read(folder)) is not None:
            return finished
        if folder in self._ended:
            raise self._ended[folder]  # it would end there again
        if self._rescores:
            raise NotKeptError(f"its training run is not in {folder.parent}, or of other code")
        if self._progress is not None:
            self._progress.note(f"{case}: training {training.protocol.name}{training.attacker()}")
        _try_out(training)
        with self._grids(training.data.nodes) as (grid, roster):
            try:
                return train(prepared, grid, folder, roster=roster)
            except (NonFiniteError, HijackDivergedError, BrokenPluginError, NodeFailed) as error:
                if (ended := _ended(error)) is None:
                    raise
                self._ended[folder] = ended
            raise self._ended[folder]

    def _answered(self, cell: Cell, trained: TrainingRun) -> tuple[Attacked, tuple[str, ...]]:
        """Return the answer to a cell, kept or made now, and a note if it is too large to keep."""
        settings, training = cell.settings, cell.settings.training
        path = self._folder / "guesses" / f"{answer_key_of(settings, self._prepared)}.safetensors"
        if (kept := kept_answer(path, cell.attack)) is not None:
            return kept, ()
        if self._rescores:
            raise NotKeptError(f"its guess is not in {path.parent}, or of other code")
        if training.adversary is not None:
            attacked = decoded_attack(trained, cell)
        elif training.intruder is not None:
            attacked = sampled(trained, cell, self._prepared)
        else:
            if self._progress is not None:
                self._progress.note(f"{settings.case}: attacking with {settings.attack.name}")
            attacked = answer(trained, cell, trace=self._trace(trained))
        note = keep_answer(attacked, path)
        return attacked, () if note is None else (note,)

    def _noise_of(self, trained: TrainingRun) -> tuple[str, ...]:
        """Return what a run's recorded noise is that its defence does not say; checked once."""
        if trained.folder not in self._noise:
            model = self._prepared.settings.model.name  # the user names it, so it may be imported
            forged = self._prepared.settings.adversary is not None
            key = trained.answer_key()
            found = noise_of_run(self._trace(trained), key, forged=forged, model=model)
            self._noise[trained.folder] = tuple(
                f"recorded noise, {each}" for each in found if not each.sound
            )
        return self._noise[trained.folder]

    def _trace(self, trained: TrainingRun) -> Trace:
        """Return a run's trace, verified once for all attacks, and read once if it is short."""
        if trained.trace not in self._traces:
            self._traces[trained.trace] = trace = trained.open_trace()
            trace.hold(at_most=_SHORT)
        return self._traces[trained.trace]

    def _scored(
        self,
        cell: Cell,
        key: str,
        trained: TrainingRun,
        attacked: Attacked,
        notes: tuple[str, ...],
    ) -> Card:
        """Score an answer, and say what the run came to."""
        settings, training = cell.settings, cell.settings.training
        utility: JsonObject = {}
        cost: JsonObject = {"attack_seconds": attacked.seconds}
        if training.intruder is not None:
            cost = {}
            if settings.attack.control is not False:
                honest = self.trained(settings.case, without_intruder(self._prepared))
                utility = {f"honest_{name}": value for name, value in honest.utility.items()}
            verdict, truth = judge_samples(attacked, trained, self._prepared)
        else:
            measures = tuple(own_class(e.name, "metric")(**e.own) for e in settings.metrics)
            answers = replace(trained.answer_key(), measures=measures)
            stream = derive(training.seed, "oracle")
            verdict, truth = judge(attacked, answers, self._trace(trained), stream=stream)
            if training.adversary is not None:
                verdict = self._beside_a_hijack(cell, trained, verdict)
        guess = answer_key_of(settings, self._prepared)
        keep_truth(truth, self._folder / "truths" / f"{guess}.safetensors")
        verdict = replace(verdict, notes=(*verdict.notes, *notes))
        return self._card(
            cell, key, trained, verdict, attacked=attacked, cost=cost, utility=utility, guess=guess
        )

    def _beside_a_hijack(self, cell: Cell, trained: TrainingRun, verdict: Verdict) -> Verdict:
        """Put the curve of an adversary beside its scores, and of a hijack a control run."""
        beside: JsonObject = {}
        settings = cell.settings
        if settings.attack.control is not False and not settings.attack.live:
            control = self.trained(settings.case, _never_hijacked(self._prepared))
            stream = derive(settings.training.seed, "oracle")
            beside = {
                "never_hijacked": never_hijacked(control, cell),
                **honest_probe(control, cell, stream=stream),
                "detection": detected(control),
            }
        return replace(
            verdict,
            scores={**verdict.scores, "checkpoints": quality(trained)},
            control={**(verdict.control or {}), **beside} or None,
        )

    def _card(
        self,
        cell: Cell,
        key: str,
        trained: TrainingRun,
        verdict: Verdict,
        *,
        attacked: Attacked,
        cost: JsonObject,
        utility: JsonObject,
        guess: str,
    ) -> Card:
        """Say what a run came to; cost and utility stand beside what the training had of them."""
        device = resolve_device(cell.settings.training.device)
        return Card(
            **card_fields(cell, key),
            device={**describe_device(device), "nodes": ", ".join(trained.devices)},
            status="done",
            guess=guess,
            exposure=attacked.exposure,
            scores=verdict.scores,
            baselines=verdict.baselines,
            control=verdict.control,
            utility={**trained.utility, **utility},
            detection=detected(trained),
            smashed=dict(trained.smashed),
            cost={
                **trained.cost,
                **cost,
                "peak_memory": peak_memory(),
                **peak_gpu_memory(device),
            },
            unreliable=verdict.unreliable,
            notes=(*attacked.notes, *verdict.notes, *_of_this_process(cell.settings)),
            stopped_on_budget=verdict.stopped_on_budget,
            noise=self._noise_of(trained),
            ceiling=self._bounds.beside(cell, trained.folder, verdict.scores, attacked.targets),
        )


def _of_this_process(cell: CellSettings) -> list[str]:
    """Say which parts of a cell were objects that a process was handed."""
    training = cell.training
    names = (training.data.name, training.data.public_from or "", training.model.name)
    own = (training.protocol.name, *training.plugins(), *cell.judged_by())
    return [
        f"{path} is {why}: this card alone does not tell how to run its cell again"
        for path, why in lent(dict.fromkeys((*names, *own))).items()
    ]


def _try_out(training: Training) -> None:
    """Hold a user's own defences against their contract before they are first trained with."""
    for name, own in training.defense.stack:
        if is_own(name):
            refuse_breaches(own_class(name, "defence")(**own))  # whatever it keeps stays here


def _never_hijacked(prepared: Prepared) -> Prepared:
    return replace(prepared, settings=prepared.settings.never_hijacked())


def _ended(error: Exception) -> DivergedError | BrokenPluginError | None:
    """Return how a training came to its end; None for an end that another try may not have."""
    if isinstance(error, BrokenPluginError):
        return error
    if isinstance(error, NodeFailed):
        if error.broken_plugin is not None:
            return BrokenPluginError(error.broken_plugin)
        if not error.diverged:
            return None
    return DivergedError(str(error))
