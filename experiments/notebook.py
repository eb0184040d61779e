"""Train once and attack in memory, with the objects of a notebook: ``leakbed.train``.

Everything is that of an experiment of one cell: the same settings, streams, training under the
wiretap, view for the attack and oracle, so the numbers are those that ``leakbed.run`` gives of the
same names. While a call trains or attacks, its files lie in a temporary folder that only its owner
reads; before it returns they are in memory, and the folder is gone.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from experiments.results.cards import Card
from experiments.run.attack import Cell, kept_answer
from experiments.run.executor import TrainingGroup
from experiments.run.fit import unfit
from experiments.run.keys import training_key
from experiments.run.prepare import Prepared, prepare
from experiments.run.train import grids_of
from experiments.run.training_run import TrainingRun
from experiments.settings.cells import CellSettings, cells
from experiments.settings.load import load_settings
from experiments.settings.objects import method, named, refuse_elsewhere
from experiments.settings.plugins import JsonObject
from experiments.settings.schema import SECTIONS, SettingsError
from leakbed.contracts import Guess
from leakbed.events import CutGradientDown, Event, Phase, SmashedUp, UpdateUp
from leakbed.flower_internals import flower_log, task_identity
from leakbed.lookup import unknown_name
from leakbed.tensors import configure_torch

Place = tuple[int, ...]
"""Of a message at the cut: node, round, step; of an update: node, round."""
_WHOLE = {"seed": "seed", "device": "device", "keep_rounds": "keep_rounds"}
_NAME = "notebook"


class NoScoresError(RuntimeError):
    """An attack on a run came to no scores: it does not fit, or its training diverged."""


class Samples(NamedTuple):
    """Private rows behind one message, or behind every target of an attack.

    Attributes:
        images: Pixel values in [0, 1].
        labels: Their classes.
    """

    images: Float[Tensor, "*rows channels height width"]
    labels: Int[Tensor, "*rows"]


class Update(NamedTuple):
    """What a node received and what it sent back.

    Attributes:
        before: Weights and buffers by name.
        after: Likewise, after its local training.
    """

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """What an attack guessed, and what the oracle says of it.

    Attributes:
        card: As of every cell of an experiment, with the threat model in words.
        guess: Images, labels and the like of every target; None of one above 256 MiB.
        truth: The private samples behind the targets; None where they are more than 1,000.
    """

    card: Card
    guess: Guess | None
    truth: Samples | None

    @property
    def scores(self) -> Mapping[str, Any]:
        """Every metric of the guess: its mean, spread and values by target."""
        return self.card.scores

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float | None]]:
        """Means of the same metrics without evidence, by baseline."""
        return self.card.baselines

    def __repr__(self) -> str:
        """Show each metric beside its baselines, one line each, and what speaks against them."""
        threat = "" if self.card.threat is None else f": {self.card.threat.in_words}"
        lines = [f"{self.card.attack} on {self.card.protocol}{threat}"]
        for name, found in self.scores.items():
            if isinstance(found, dict) and isinstance(found.get("mean"), float):
                beside = [
                    f"{baseline} {means[name]:.3f}"
                    for baseline, means in self.baselines.items()
                    if means.get(name) is not None
                ]
                without = f" (without evidence: {', '.join(beside)})" if beside else ""
                lines.append(f"  {name} {found['mean']:.3f}{without}")
        doubts = [*filter(None, [self.card.unreliable]), *self.card.noise_doubts]
        return "\n".join([*lines, *(f"  {doubt}" for doubt in doubts)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One training, recorded, with what is private in it: its owner's, as the whole notebook is.

    An attack is never given the run, but a view of what its seat may read.

    Attributes:
        settings: As :func:`leakbed.run` takes them, of the training alone.
        prepared: Its ingredients.
        finished: The run itself, in memory.
        verbose: Whether Flower's log is shown.
        checked: What the check of its noise found, once an attack asked for it.
    """

    settings: JsonObject
    prepared: Prepared
    finished: TrainingRun
    verbose: bool = False
    checked: dict[Path, tuple[str, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        training, accuracy = self.prepared.settings, self.utility.get("test_accuracy")
        said = "" if accuracy is None else f", test accuracy {accuracy:.3f}"
        return f"Run({training.protocol.name}, {training.defense.name}, seed {training.seed}{said})"

    @property
    def utility(self) -> Mapping[str, float]:
        """Test accuracy and the like; empty where no rows were held out."""
        return self.finished.utility

    @cached_property
    def smashed(self) -> dict[Place, Tensor]:
        """Smashed data of training, as sent, by node, round and step; empty without a cut."""
        return {
            _place(each): torch.from_numpy(each.smashed)
            for each in self._events(SmashedUp)
            if isinstance(each, SmashedUp) and each.phase == Phase.TRAIN
        }

    @cached_property
    def cut_gradients(self) -> dict[Place, Tensor]:
        """Gradients at the cut, as sent, by node, round and step."""
        return {
            _place(each): torch.from_numpy(each.gradient)
            for each in self._events(CutGradientDown)
            if isinstance(each, CutGradientDown)
        }

    @cached_property
    def updates(self) -> dict[Place, Update]:
        """Weights of nodes before and after, as sent, by node and round; empty with a cut."""
        return {
            (each.node, each.round): Update(_tensors(each.before), _tensors(each.after))
            for each in self._events(UpdateUp)
            if isinstance(each, UpdateUp)
        }

    @cached_property
    def truth(self) -> dict[Place, Samples]:
        """Private rows behind each message, by the places of ``smashed`` or of ``updates``.

        Of an update all rows that it was trained on, step by step. Where nodes hold strips of every
        image, images are whole.
        """
        key = self.finished.answer_key()
        rows: dict[Place, list[int]] = {}
        for place, batch in key.order.items():
            rows.setdefault(place if place in self.smashed else place[:2], []).extend(batch)
        places = self.smashed or self.updates
        return {each: Samples(key.images[rows[each]], key.labels[rows[each]]) for each in places}

    def attack(self, attack: object, *, metrics: Sequence[object] = (), **settings: Any) -> Scored:  # noqa: ANN401  JSON's
        """Attack the run as its threat model allows, and score the guess.

        An attack that acts while a run trains (a malicious server or client, ``live=True``) gets a
        training of its own, beside which its control is trained. Code of the attack's that breaks
        is a :class:`~leakbed.contracts.BrokenPluginError`.

        Args:
            attack: An object, a class, a catalogue key or ``package.module:Class``.
            metrics: Metrics of one's own to score guessed images by besides.
            **settings: Keys of an ``[[attack]]`` table: ``targets``, ``restarts``, ``when``, ...,
                and the attack's own.

        Returns:
            Scores with baselines, the guess, and the truth behind it.

        Raises:
            NoScoresError: The attack does not fit the run, or its own training diverged; says why.
            SettingsError: A setting is not legal, or the settings are those of several attacks.
        """
        table = method("attack", {"name": attack, **settings})
        measured = [method("metric", {"name": each}) for each in metrics]
        found = cells(load_settings({**self.settings, "attack": [table], "metric": measured}))
        if len(found) > 1:
            raise SettingsError(
                f"attack: a list of settings is {len(found)} attacks; call attack once for each"
            )
        cell = found[0]
        with _working(verbose=self.verbose) as folder:
            group = self._group(cell, folder)
            made = Cell.of(cell)
            (card,) = group.cards(group.keyed([made]), {})
            if card.status != "done":
                raise NoScoresError(f"{card.attack} came to no scores ({card.status}): {card.why}")
            file = f"{card.guess_key}.safetensors"
            kept = kept_answer(folder / "guesses" / file, made.attack)
            truth = load_file(folder / "truths" / file)
        return Scored(
            card=card,
            guess=None if kept is None else kept.guess,
            truth=Samples(truth["images"], truth["labels"]) if "images" in truth else None,
        )

    def _group(self, cell: CellSettings, folder: Path) -> TrainingGroup:
        """Return what attacks a cell: on this run, or on a training that the attack acts in."""
        here = self.prepared
        acts = cell.training.adversary is not None or cell.training.intruder is not None
        if not acts and cell.training != here.settings:
            raise SettingsError(
                f"collect = {cell.attack.collect!r}: this run keeps its last round alone; train "
                "with keep_rounds = 'all'"
            )
        own = prepare(cell.training, root=here.data.root) if acts else here
        return TrainingGroup(
            own,
            folder=folder,
            grids=grids_of(load_settings({**self.settings, "attack": [_NOBODY]})),
            progress=None,
            on_error="stop",
            known={training_key(here): self.finished},
            checked=self.checked,
        )

    def _events(self, kind: type[Event]) -> Iterator[Event]:
        return self.finished.open_trace().events(kind)


_NOBODY = {"name": "constant-image"}  # settings name an attack; a training asks for none


def train(
    *,
    model: object,
    data: object,
    protocol: object = "vanilla-split",
    defense: object = "none",
    verbose: bool = False,
    **settings: Any,  # noqa: ANN401  JSON's
) -> Run:
    """Train under the wiretap, in memory: nothing is printed, and no folder is left.

    Data, networks and cuts that do not fit raise the errors of :mod:`leakbed.data` and
    :mod:`leakbed.models`; a training that comes to nothing raises what an experiment writes on its
    card.

    Args:
        model: A network, whose weights are drawn anew, a class or function that makes one, a
            catalogue key, or an import path.
        data: A torch Dataset or list of (image, label) pairs, arrays as (images, labels), a
            :class:`~leakbed.data.objects.Table`, a function, a catalogue key, or an import path.
        protocol: A catalogue key, an import path, or a ``strategies.Protocol``.
        defense: An object, a class, a catalogue key or an import path; a list of them is a stack.
        verbose: Whether Flower's log is shown.
        **settings: Keys of ``[data]``, ``[model]`` and ``[protocol]`` of a settings file, such as
            ``cut``, ``nodes``, ``rounds``; and ``seed``, ``device``, ``keep_rounds``.

    Returns:
        The run.

    Raises:
        SettingsError: A key is unknown, a value is not legal, or the defence does not fit.
    """
    table = named(_table(settings, data=data, model=model, protocol=protocol))
    table["defense"] = [_stack(defense)]
    checked = load_settings({**table, "attack": [_NOBODY]})
    refuse_elsewhere(checked)
    found = cells(checked)
    if len(found) > 1:
        raise SettingsError(
            f"defense: a list of values is {len(found)} defences, and one is trained with at a "
            "time; give one value, or call train() once for each"
        )
    if (why := unfit(Cell.of(found[0])).get("defenses")) is not None:
        raise SettingsError(f"defense: {why}")
    with _working(verbose=verbose) as folder:
        prepared = prepare(found[0].training, root=_root())
        group = TrainingGroup(prepared, folder=folder, grids=grids_of(checked), progress=None)
        finished = group.trained(_NAME).in_memory()
    return Run(settings=table, prepared=prepared, finished=finished, verbose=verbose)


def _table(settings: Mapping[str, Any], **parts: object) -> JsonObject:
    """Return settings by section; each key belongs to one of them."""
    table = named({section: {"name": given} for section, given in parts.items()})
    table |= {"name": _NAME, "keep_rounds": "all"}
    named_so = load_settings({**table, "attack": [_NOBODY]}).protocol
    keys = {section: kind.model_fields.keys() - _APART for section, kind in SECTIONS.items()}
    keys["protocol"] |= named_so.chosen.keys()
    for key, value in settings.items():
        places = [section for section, known in keys.items() if key in known]
        if key in _WHOLE:
            table[key] = value
        elif places:
            table[places[0]][key] = value
        else:
            legal = {*_WHOLE}.union(*keys.values())
            raise SettingsError(unknown_name("setting of a training", key, legal))
    return table


_APART = {"name", "settings"}  # of each section; what a function takes is bound to it beforehand


def _stack(defense: object) -> object:
    """Return the table of one defence or of a stack."""
    if isinstance(defense, list | tuple):
        return {"stack": [_stack(each) for each in defense]}
    given = defense if isinstance(defense, Mapping) else {"name": defense}
    return method("defense", given)


def _root() -> str | None:
    root = os.environ.get("LEAKBED_DATA")
    return str(Path(root).absolute()) if root else None


@contextmanager
def _working(*, verbose: bool) -> Iterator[Path]:
    """Give a folder that goes when the work is done, and let this process make messages."""
    configure_torch()
    log = nullcontext() if verbose else flower_log()
    with TemporaryDirectory(prefix="leakbed-") as folder, log, task_identity():
        yield Path(folder)


def _place(event: Event) -> Place:
    return event.node, event.round, event.step


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
