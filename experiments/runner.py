"""Runs an experiment: every cell once, resumable, one card each.

``DIR/cards/<key>.json`` are the results, ``DIR/runs/<key>/`` the training runs they share,
``DIR/guesses/`` and ``DIR/truths/`` the reconstructions and what they should be.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from experiments.attacking import (
    Attacked,
    Verdict,
    attack_run,
    judge,
    keep_guess,
    keep_truth,
    make_attack,
)
from experiments.cells import CellSettings, cells
from experiments.decoding import decoded_attack, honest_probe, never_hijacked, quality
from experiments.describing import described, without_result
from experiments.detecting import detected
from experiments.last_run import note_last_run
from experiments.lending import Grids, grids_of
from experiments.preparing import Prepared, make_defenses, misfit, prepare, unread
from experiments.prototyping import judge_samples, sampled, without_intruder
from experiments.run_folder import TrainingRun
from experiments.settings import JsonObject, Settings
from experiments.settings_file import load_settings
from experiments.settling import settled
from experiments.soundness import NonFiniteError
from experiments.training import train
from leakbed.api import Progress
from leakbed.cards import Card, card_key, peak_memory, read_cards, source_hash, write_card
from leakbed.contracts import MissingKnowledgeError, UnfitViewError
from leakbed.flower_internals import task_identity
from leakbed.grids.failures import NodeFailed
from leakbed.oracle.answer_key import AnswerKey
from leakbed.seeds import derive
from leakbed.targets import MisfitError

UNFIT = (MisfitError, MissingKnowledgeError, UnfitViewError)


def run(
    settings: Settings | Mapping[str, Any] | str | Path,
    *,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    grids: Grids | None = None,
    root: str | None = None,
) -> list[Card]:
    """Run every cell of an experiment that has no card yet.

    Args:
        settings: A settings file, or what it would hold.
        out: Where cards, runs and guesses go; ``runs/<name>`` if None.
        overrides: ``key=value`` pairs that replace settings.
        progress: Told how far the run is.
        grids: Where nodes are; by default the grid the settings name.
        root: Folder of downloaded data sets; by default the environment's ``LEAKBED_DATA``.

    Returns:
        The cards of all cells, old and new, in cell order.
    """
    torch.set_num_threads(1)  # same bits everywhere, and small models are faster so
    checked = load_settings(settings, overrides)
    folder = Path("runs") / checked.name if out is None else Path(out)
    wanted = [settled(cell) for cell in cells(checked)]
    for cell in wanted:
        make_attack(cell.attack)  # bad values are refused before anything is trained
        make_defenses(cell.training)
    root = root or os.environ.get("LEAKBED_DATA")
    root = str(Path(root).absolute()) if root else None  # workers may start elsewhere
    groups = [list(group) for _, group in groupby(wanted, key=lambda cell: cell.training)]
    prepared = [prepare(group[0].training, root=root) for group in groups]
    source = source_hash()
    done = {card.key: card for card in read_cards(folder)} if (folder / "cards").is_dir() else {}
    lent = grids or grids_of(checked)
    runners = [
        _Runner(each, folder=folder, source=source, grids=lent, progress=progress)
        for each in prepared
    ]
    keyed = [runner.keyed(group) for runner, group in zip(runners, groups, strict=True)]
    note_last_run(folder, checked.name, [key for group in keyed for key in group])
    if progress is not None:
        progress.start(sum(map(len, keyed)))
    found: list[Card] = []
    with task_identity():
        for runner, group in zip(runners, keyed, strict=True):
            found += runner.cells_of(group, done)
            if not checked.keep_runs:
                runner.tidy()
    return found


class DivergedError(RuntimeError):
    """Training left the finite numbers, so that there is nothing to attack."""


class _Runner:
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

    def cells_of(self, keyed: Mapping[str, CellSettings], done: Mapping[str, Card]) -> list[Card]:
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
                self._progress.advance(f"{cell.case}: {cell.attack.name} / {training.defense.name}")
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
        except UNFIT as error:
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
