"""The cells of one training run: trained once, attacked by each, a card for each.

Card fields common to finished, unfit and diverged cells are made here too.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from experiments.results.cards import Card, Threat, card_key, peak_memory
from experiments.run.alarms import detected
from experiments.run.attack import (
    Attacked,
    EmptyGuessError,
    Verdict,
    attack_run,
    judge,
    keep_guess,
    keep_truth,
    make_attack,
)
from experiments.run.card_ceilings import Bounds
from experiments.run.malicious_client import judge_samples, sampled, without_intruder
from experiments.run.malicious_server import decoded_attack, honest_probe, never_hijacked, quality
from experiments.run.prepare import Prepared, misfit, unfit, unread
from experiments.run.targets import MisfitError
from experiments.run.train import Grids, NonFiniteError, train
from experiments.run.training_run import TrainingRun
from experiments.settings.cells import CellSettings, Training
from experiments.settings.plugins import JsonObject
from leakbed import __version__
from leakbed.contract_trials import refuse_breaches
from leakbed.contracts import BrokenPluginError, MissingKnowledgeError, UnfitViewError
from leakbed.grids.base import NodeFailed
from leakbed.hijack import HijackDivergedError
from leakbed.oracle.truth import AnswerKey
from leakbed.plugins import is_own, own_class
from leakbed.provenance import with_code
from leakbed.seeds import derive
from leakbed.tap.trace import Trace
from leakbed.tensors import describe_device, peak_gpu_memory, resolve_device
from strategies import PROTOCOLS


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


def card_fields(cell: CellSettings, key: str, source: str) -> dict[str, Any]:
    """Return card fields common to finished, unfit and diverged cells.

    Args:
        cell: The cell.
        key: Of its card.
        source: Hash of the code that runs it.

    Returns:
        Fields of a :class:`~experiments.results.cards.Card`.
    """
    training = cell.training
    exchanges = PROTOCOLS[training.protocol.name].exchanges
    return {
        "key": key,
        "case": cell.case,
        "demo": cell.demo,
        "protocol": training.protocol.name,
        "data": training.data.name,
        "model": training.model.name,
        "cut": training.model.cut if exchanges == "split" else None,
        "nodes": training.data.nodes,
        "attack": cell.attack.name,
        "defense": training.defense.name,
        "seed": training.seed,
        "threat": Threat.of(make_attack(cell.attack).threat),
        "tuned_on": cell.attack.model_dump(mode="json")["tuned_on"],
        "settings": cell.as_json(),
        "reported": cell.attack.reported,
        "version": __version__,
        "source": source,
    }


def empty_card(
    cell: CellSettings,
    key: str,
    source: str,
    *,
    status: Literal["unfit", "diverged", "failed"],
    why: str,
) -> Card:
    """Return the card of a cell that came to no result.

    Args:
        cell: The cell.
        key: Of its card.
        source: Hash of the code that runs it.
        status: What became of it.
        why: In words.

    Returns:
        A card without scores.
    """
    return Card(**card_fields(cell, key, source), status=status, why=why)


_UNFIT = (MisfitError, MissingKnowledgeError, UnfitViewError, EmptyGuessError)


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
        """Remove what nobody needs any more: cards, guesses and truths stay.

        Args:
            group: One that is done.
        """
        self._users.subtract(group.runs)
        for folder in () if self._keep else group.runs:
            if not self._users[folder]:
                shutil.rmtree(folder, ignore_errors=True)


class DivergedError(RuntimeError):
    """Training left the finite numbers, so that there is nothing to attack."""


class TrainingGroup:
    """The cells of one training run."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        folder: Path,
        source: str,
        grids: Grids,
        progress: Progress | None,
        on_error: Literal["card", "stop"] = "card",
    ) -> None:
        """Train nothing yet.

        Args:
            prepared: The training run.
            folder: For results.
            source: Hash of the code.
            grids: Where nodes are.
            progress: Told how far it is.
            on_error: What follows where the code of an attack or a defence breaks.
        """
        self._prepared, self._folder, self._source = prepared, folder, source
        self._grids, self._progress = grids, progress
        self._stops = on_error == "stop"
        self._ended: dict[Path, DivergedError | BrokenPluginError] = {}
        self._bounds = Bounds()
        self._traces: dict[Path, Trace] = {}

    @property
    def _ran_on(self) -> str:
        return f"{self._source}:{self._prepared.fingerprint}"

    def keyed(self, group: Sequence[CellSettings]) -> dict[str, CellSettings]:
        """Return the cells by the keys of their cards."""
        return {
            card_key(cell.as_json(), with_code(self._ran_on, cell.attack.name)): cell
            for cell in group
        }

    def cards(self, keyed: Mapping[str, CellSettings], done: Mapping[str, Card]) -> Iterator[Card]:
        """Yield a card per cell as it is there; train only if one of them is missing and fits.

        Args:
            keyed: From :meth:`keyed`.
            done: Cards that stand; those of these cells are yielded as they are.

        Yields:
            Cards in the order of the cells; who asked for a new one writes it.
        """
        training = self._prepared.settings
        for key, cell in keyed.items():
            if key in done:
                yield done[key]
                continue
            attack = make_attack(cell.attack)
            why = misfit(training) or unread(attack.threat, training)
            why = why or unfit(attack, self._prepared)
            if why is None:
                yield self._attacked(cell, key)
            else:
                yield empty_card(cell, key, self._source, status="unfit", why=why)

    @property
    def runs(self) -> set[Path]:
        """The folders of the training runs that the cells may need; other groups may as well."""
        own = self._prepared.settings
        honest = own if own.intruder is None else without_intruder(self._prepared).settings
        return {self._run(training) for training in (own, own.never_hijacked(), honest)}

    def _run(self, training: Training) -> Path:
        return self._folder / "runs" / training.key(self._ran_on)

    def _trained(self, case: str, prepared: Prepared) -> TrainingRun:
        """Return a finished run of these settings, trained now if there is none."""
        training = prepared.settings
        folder = self._run(training)
        if (finished := TrainingRun.read(folder)) is not None:
            return finished
        if folder in self._ended:
            raise self._ended[folder]  # it would end there again
        if self._progress is not None:
            self._progress.note(f"{case}: training {training.protocol.name}{training.attacker()}")
        for name, own in training.defense.stack:
            if is_own(name):
                refuse_breaches(own_class(name, "defence")(**own))
        with self._grids(training.data.nodes) as (grid, roster):
            try:
                return train(prepared, grid, folder, roster=roster)
            except (NonFiniteError, HijackDivergedError, BrokenPluginError, NodeFailed) as error:
                if (ended := _ended(error)) is None:
                    raise
                self._ended[folder] = ended
            raise self._ended[folder]

    def _attacked(self, cell: CellSettings, key: str) -> Card:
        try:
            if cell.training.adversary is not None:
                return self._attacked_live(cell, key)
            if cell.training.intruder is not None:
                return self._intruded(cell, key)
            trained = self._trained(cell.case, self._prepared)
            return self._judged(cell, key, trained, self._passive(cell, trained))
        except _UNFIT as error:
            return empty_card(cell, key, self._source, status="unfit", why=str(error))
        except DivergedError as error:
            return empty_card(cell, key, self._source, status="diverged", why=str(error))
        except BrokenPluginError as error:
            if self._stops:
                raise
            return empty_card(cell, key, self._source, status="failed", why=str(error))

    def _passive(self, cell: CellSettings, trained: TrainingRun) -> Attacked:
        """Attack the trace of a run."""
        name = cell.attack.name
        if self._progress is not None:
            self._progress.note(f"{cell.case}: attacking with {name}")
        return attack_run(
            self._trace(trained),
            cell.attack,
            stream=derive(cell.training.seed, f"adversary/{name}"),
            device=cell.training.device,
            answers=trained.answers,
        )

    def _trace(self, trained: TrainingRun) -> Trace:
        """Return a run's trace, verified once for all attacks; what is read is checked again."""
        if trained.trace not in self._traces:
            self._traces[trained.trace] = Trace(trained.trace)
        return self._traces[trained.trace]

    def _attacked_live(self, cell: CellSettings, key: str) -> Card:
        """Train with the adversary and judge what it decoded; of a hijack, a control run beside."""
        trained = self._trained(cell.case, self._prepared)
        attacked, beside = decoded_attack(trained, cell.attack), {}
        if cell.attack.control is not False and not cell.attack.live:
            stream = derive(cell.training.seed, "oracle")
            settings = self._prepared.settings.never_hijacked()
            control = self._trained(cell.case, replace(self._prepared, settings=settings))
            beside = {
                "never_hijacked": never_hijacked(control, cell.attack),
                **honest_probe(control, cell.attack, stream=stream),
                "detection": detected(control),
            }
        curve = {"checkpoints": quality(trained)}
        return self._judged(cell, key, trained, attacked, scores=curve, control=beside)

    def _intruded(self, cell: CellSettings, key: str) -> Card:
        """Train with a malicious client and judge its samples, a run of honest nodes beside it."""
        trained, utility = self._trained(cell.case, self._prepared), {}
        if cell.attack.control is not False:
            honest = self._trained(cell.case, without_intruder(self._prepared))
            utility = {f"honest_{name}": value for name, value in honest.utility.items()}
        attacked = sampled(trained, cell.attack)
        keep_guess(attacked, self._folder / "guesses" / f"{key}.safetensors")
        verdict, truth = judge_samples(attacked, trained, self._prepared)
        keep_truth(truth, self._folder / "truths" / f"{key}.safetensors")
        return self._card(cell, key, trained, verdict, attacked=attacked, utility=utility)

    def _judged(
        self,
        cell: CellSettings,
        key: str,
        trained: TrainingRun,
        attacked: Attacked,
        *,
        scores: JsonObject | None = None,
        control: JsonObject | None = None,
    ) -> Card:
        """Keep a guess, score it, and say what the run came to; the last two stand beside that."""
        keep_guess(attacked, self._folder / "guesses" / f"{key}.safetensors")
        answers = AnswerKey.read(trained.answers)
        stream = derive(cell.training.seed, "oracle")
        verdict, truth = judge(attacked, answers, self._trace(trained), stream=stream)
        keep_truth(truth, self._folder / "truths" / f"{key}.safetensors")
        verdict = replace(
            verdict,
            scores={**verdict.scores, **(scores or {})},
            control={**(verdict.control or {}), **(control or {})} or None,
        )
        cost = {"attack_seconds": attacked.seconds}
        return self._card(cell, key, trained, verdict, attacked=attacked, cost=cost)

    def _card(
        self,
        cell: CellSettings,
        key: str,
        trained: TrainingRun,
        verdict: Verdict,
        *,
        attacked: Attacked,
        cost: JsonObject | None = None,
        utility: JsonObject | None = None,
    ) -> Card:
        """Say what a run came to; the last two stand beside what the training took and left."""
        where = describe_device(resolve_device(cell.training.device))
        return Card(
            **card_fields(cell, key, self._source),
            device={**where, "nodes": ", ".join(trained.devices)},
            status="done",
            exposure=attacked.exposure,
            scores=verdict.scores,
            baselines=verdict.baselines,
            control=verdict.control,
            utility={**trained.utility, **(utility or {})},
            detection=detected(trained),
            smashed=dict(trained.smashed),
            cost={
                **trained.cost,
                **(cost or {}),
                "peak_memory": peak_memory(),
                **peak_gpu_memory(resolve_device(cell.training.device)),
            },
            unreliable=verdict.unreliable,
            notes=(*attacked.notes, *verdict.notes),
            stopped_on_budget=verdict.stopped_on_budget,
            ceiling=self._bounds.beside(cell, trained.folder, verdict.scores),
        )


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
