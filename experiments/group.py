"""The cells of one training run: trained once, attacked by each, a card for each."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from experiments.attacking import (
    Attacked,
    Verdict,
    attack_run,
    judge,
    keep_guess,
    keep_truth,
    make_attack,
)
from experiments.cells import CellSettings
from experiments.decoding import decoded_attack, honest_probe, never_hijacked, quality
from experiments.describing import described, without_result
from experiments.detecting import detected
from experiments.lending import Grids
from experiments.preparing import Prepared, misfit, unread
from experiments.prototyping import judge_samples, sampled, without_intruder
from experiments.run_folder import TrainingRun
from experiments.settings import JsonObject
from experiments.soundness import NonFiniteError
from experiments.training import train
from leakbed.api import Progress
from leakbed.cards import Card, card_key, peak_memory, write_card
from leakbed.contracts import MissingKnowledgeError, UnfitViewError
from leakbed.grids.failures import NodeFailed
from leakbed.oracle.answer_key import AnswerKey
from leakbed.seeds import derive
from leakbed.targets import MisfitError

_UNFIT = (MisfitError, MissingKnowledgeError, UnfitViewError)


class DivergedError(RuntimeError):
    """Training left the finite numbers, so that there is nothing to attack."""


class Group:
    """The cells of one training run."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        folder: Path,
        source: str,
        grids: Grids,
        progress: Progress | None,
    ) -> None:
        """Train nothing yet.

        Args:
            prepared: The training run.
            folder: For results.
            source: Hash of the code.
            grids: Where nodes are.
            progress: Told how far it is.
        """
        self._prepared, self._folder, self._source = prepared, folder, source
        self._grids, self._progress = grids, progress
        self._runs: set[Path] = set()
        self._diverged: dict[Path, DivergedError] = {}

    @property
    def _ran_on(self) -> str:
        return f"{self._source}:{self._prepared.fingerprint}"

    def keyed(self, group: Sequence[CellSettings]) -> dict[str, CellSettings]:
        """Return the cells by the keys of their cards."""
        return {card_key(cell.as_json(), self._ran_on): cell for cell in group}

    def cards(self, keyed: Mapping[str, CellSettings], done: Mapping[str, Card]) -> list[Card]:
        """Return a card per cell; train only if one of them is missing and fits."""
        training = self._prepared.settings
        cards = []
        for key, cell in keyed.items():
            card = done.get(key)
            if card is None:
                why = misfit(training) or unread(make_attack(cell.attack).threat, training)
                if why is None:
                    card = self._attacked(cell, key)
                else:
                    card = without_result(cell, key, self._source, status="unfit", why=why)
                write_card(card, self._folder)
            cards.append(card)
            if self._progress is not None:
                self._progress.advance(cell.label)
        return cards

    def tidy(self) -> None:
        """Remove the runs that the cells shared: their cards, guesses and truths stay."""
        for folder in self._runs:
            shutil.rmtree(folder, ignore_errors=True)

    def _trained(self, case: str, prepared: Prepared) -> TrainingRun:
        """Return a finished run of these settings, trained now if there is none."""
        training = prepared.settings
        folder = self._folder / "runs" / training.key(self._ran_on)
        self._runs.add(folder)
        if (finished := TrainingRun.read(folder)) is not None:
            return finished
        if folder in self._diverged:
            raise self._diverged[folder]  # it would end there again
        if self._progress is not None:
            self._progress.note(f"{case}: training {training.protocol.name}{training.attacker()}")
        with self._grids(training.data.nodes) as (grid, roster):
            try:
                return train(prepared, grid, folder, roster=roster)
            except NonFiniteError as error:
                self._diverged[folder] = DivergedError(str(error))
            except NodeFailed as error:
                if not error.diverged:
                    raise
                self._diverged[folder] = DivergedError(str(error))
            raise self._diverged[folder]

    def _attacked(self, cell: CellSettings, key: str) -> Card:
        try:
            if cell.training.adversary is not None:
                return self._hijacked(cell, key)
            if cell.training.intruder is not None:
                return self._intruded(cell, key)
            trained = self._trained(cell.case, self._prepared)
            return self._judged(cell, key, trained, self._passive(cell, trained))
        except _UNFIT as error:
            return without_result(cell, key, self._source, status="unfit", why=str(error))
        except DivergedError as error:
            return without_result(cell, key, self._source, status="diverged", why=str(error))

    def _passive(self, cell: CellSettings, trained: TrainingRun) -> Attacked:
        """Attack the trace of a run."""
        name = cell.attack.name
        if self._progress is not None:
            self._progress.note(f"{cell.case}: attacking with {name}")
        return attack_run(
            trained.trace,
            cell.attack,
            stream=derive(cell.training.seed, f"adversary/{name}"),
            device=cell.training.device,
            answers=trained.answers,
        )

    def _hijacked(self, cell: CellSettings, key: str) -> Card:
        """Train under the adversary and judge what it decoded, its control run beside it."""
        trained = self._trained(cell.case, self._prepared)
        attacked, beside = decoded_attack(trained, cell.attack), {}
        if cell.attack.control is not False:
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
        return self._card(cell, key, trained, verdict, utility=utility)

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
        verdict, truth = judge(attacked, answers, trained.trace, stream=stream)
        keep_truth(truth, self._folder / "truths" / f"{key}.safetensors")
        verdict = replace(
            verdict,
            scores={**verdict.scores, **(scores or {})},
            control={**(verdict.control or {}), **(control or {})} or None,
        )
        return self._card(cell, key, trained, verdict, cost={"attack_seconds": attacked.seconds})

    def _card(
        self,
        cell: CellSettings,
        key: str,
        trained: TrainingRun,
        verdict: Verdict,
        *,
        cost: JsonObject | None = None,
        utility: JsonObject | None = None,
    ) -> Card:
        """Say what a run came to; the last two stand beside what the training took and left."""
        return Card(
            **described(cell, key, self._source),
            status="done",
            scores=verdict.scores,
            baselines=verdict.baselines,
            control=verdict.control,
            utility={**trained.utility, **(utility or {})},
            detection=detected(trained),
            smashed=dict(trained.smashed),
            cost={**trained.cost, **(cost or {}), "peak_memory": peak_memory()},
            unreliable=verdict.unreliable,
        )
