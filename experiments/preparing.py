"""A training run's ingredients, checked before anything is sent; and the truth behind it."""

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from clients.cell import Cell, TrainingPlan
from clients.guard import unlabelled
from defenses import DEFENSES
from experiments.cells import Training
from experiments.dividing import check_parties, partition_of
from experiments.intruders import check_intruder, misplaced
from experiments.outlook import check_defences
from experiments.settings import SettingsError
from experiments.settings_protocol import ProtocolSettings
from experiments.settling import resolved
from leakbed.contracts import Defense, Protects, ThreatModel
from leakbed.data.recipe import DataRecipe
from leakbed.events import Arrays
from leakbed.models import Architecture, IllegalCutError, resolve_device
from leakbed.naming import imported
from leakbed.oracle.answer_key import AnswerKey
from leakbed.seeds import derive
from leakbed.strips import strip_architecture
from leakbed.targets import MisfitError, refuse_misfit
from strategies import PROTOCOLS

_SPLIT = set(Protects) - {Protects.UPDATE}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A training run's ingredients, checked before anything is sent.

    Attributes:
        settings: As the experiment has them.
        data: What the rows are a function of.
        architecture: The network.
        plan: How nodes train.
        defenses: Name and settings of each defence.
    """

    settings: Training
    data: DataRecipe
    architecture: Architecture
    plan: TrainingPlan
    defenses: tuple[tuple[str, Mapping[str, Any]], ...]

    @property
    def fingerprint(self) -> str:
        """What a run depends on beside settings and our code: its data and the user's code."""
        own = [name for name in (self.data.name, self.architecture.name) if ":" in name]
        return ":".join([self.data.digest(), *map(_own_source, own)])

    @property
    def public(self) -> Arrays | None:
        """Images and labels of the adversary's own; None where it has none."""
        images, labels = self.data.owned()
        return {"images": images.numpy(), "labels": labels.numpy()} if len(labels) else None

    def stream(self, role: str) -> int:
        """Return the stream of a role in this run."""
        return derive(self.settings.seed, role)

    def cell(self, partition: int) -> Cell:
        """Return what one node is told; feature parties share the order of their rows."""
        nodes, seen, order = self.data.nodes, self.architecture, None
        if self.data.aligned and nodes > 1:
            seen = strip_architecture(seen, party=partition, parties=nodes)
            order = self.stream("order")
        return Cell(
            data=self.data,
            architecture=seen,
            plan=self.plan,
            partition=partition,
            stream=self.stream(f"node/{partition}"),
            defence_stream=self.stream(f"defence/{partition}"),
            device=self.settings.device,
            order_stream=order,
            **self._intruder(partition),
        )

    def _intruder(self, partition: int) -> dict[str, Any]:
        """Return what makes a node malicious; it does not defend itself against anybody."""
        chosen = self.settings.intruder
        if chosen is None or partition not in chosen.nodes:
            return {"defenses": self.defenses}
        stream = self.stream(f"adversary/{chosen.name}/{partition}")
        return {"intruder": (chosen.name, chosen.own), "intruder_stream": stream}


def prepare(training: Training, *, root: str | None) -> Prepared:
    """Load the data, build the network and refuse what cannot run, before training starts.

    Data, models, cuts and batches that do not fit raise the errors of :mod:`leakbed.data`,
    :mod:`leakbed.models` and :mod:`leakbed.order`.

    Args:
        training: The run's settings.
        root: Folder of downloaded data sets, or None.

    Returns:
        The run's ingredients.
    """
    training = replace(training, protocol=resolved(training.protocol))
    model, protocol = training.model, training.protocol
    entry = PROTOCOLS[protocol.name]
    data = _recipe(training, root)
    dataset = data.dataset()
    channels, height, width = dataset.images.shape[1:]
    architecture = Architecture(
        name=model.name,
        image_shape=(channels, height, width),
        num_classes=len(dataset.classes) + model.extra_classes,
        activation=model.activation,
        initialisation=model.initialisation,
        cut=model.cut,
        upper_cut=model.upper_cut,
        linear_top=model.linear_top,
    )
    prepared = Prepared(
        settings=training,
        data=data,
        architecture=architecture,
        plan=_plan(protocol),
        defenses=training.defense.stack,
    )
    if entry.exchanges == "split":
        _check_parts(architecture, parts=entry.parts)
    check_parties(training, architecture)
    data.owned()  # refuses a public set that does not fit
    sizes = tuple(map(len, data.split().nodes))
    for partition, rows in enumerate(sizes):
        prepared.cell(partition).batches(1, rows)
    check_defences(make_defenses(training), training, architecture, rows=sizes)
    check_intruder(training, prepared.cell)
    resolve_device(training.device)
    return prepared


def _recipe(training: Training, root: str | None) -> DataRecipe:
    chosen = training.data
    own = dict(chosen.partition_settings)
    if chosen.alpha is not None:
        own["alpha"] = chosen.alpha
    return DataRecipe(
        name=chosen.name,
        nodes=chosen.nodes,
        stream=derive(training.seed, "data"),
        root=root,
        size=chosen.size,
        image_size=chosen.image_size,
        channels=chosen.channels,
        partition=partition_of(training),
        partition_settings=tuple(sorted(own.items())),
        public=chosen.public,
        public_from=chosen.public_from,
        test=chosen.test,
        download=chosen.download,
    )


def _plan(protocol: ProtocolSettings) -> TrainingPlan:
    """Return how nodes train; a setting that would be ignored is refused."""
    if protocol.optimizer == "adam" and protocol.momentum:
        raise SettingsError(f"protocol.momentum = {protocol.momentum} is SGD's; Adam has none")
    return TrainingPlan(
        batch_size=protocol.batch_size,
        local_steps=protocol.local_steps,
        optimizer=protocol.optimizer,
        learning_rate=protocol.learning_rate,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
        labels=protocol.labels or "shared",
        bottoms=protocol.bottoms or "sealed",
        optimizer_state=protocol.optimizer_state or "kept",
    )


def _check_parts(architecture: Architecture, *, parts: int) -> None:
    """Refuse an illegal cut, and one that leaves a party without weights."""
    cut = architecture.parts(0)
    held = {"bottom": cut.bottom, "top": cut.top}
    if parts == 3:  # noqa: PLR2004  bottom, middle and head
        held = {
            "bottom": cut.bottom,
            "middle": architecture.middle(0),
            "head": architecture.head(0),
        }
    for name, part in held.items():
        if not list(part.parameters()):
            raise IllegalCutError(
                f"cut {architecture.cut} leaves the {name} nothing to train; set model.cut (and "
                "model.upper_cut, where there is a head) so that every part has layers with weights"
            )


def _own_source(path: str) -> str:
    """Return a checksum of the file that defines a user's class or function."""
    file = inspect.getsourcefile(cast("type", inspect.unwrap(cast("Any", imported(path)))))
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else path


def make_defenses(training: Training) -> tuple[Defense, ...]:
    """Return a run's defences; values out of range raise the defence's own errors."""
    return tuple(DEFENSES[name](**own) for name, own in training.defense.stack)


def unread(threat: ThreatModel, training: Training) -> str | None:
    """Return why a protocol sends nothing that an attack reads, or None if it does."""
    entry = PROTOCOLS[training.protocol.name]
    if threat.active and entry.divides == "features":
        return (
            f"each party of {training.protocol.name} holds a strip of every image, and no "
            "adversary here forges the gradients of strips; use 'vanilla-split'"
        )
    try:
        refuse_misfit(threat, updates=entry.exchanges == "weights")
    except MisfitError as error:
        return str(error)
    return None


def misfit(training: Training) -> str | None:
    """Return why a defence or an intruder does not fit a protocol, or None if all do."""
    exchanges = PROTOCOLS[training.protocol.name].exchanges
    sent = {Protects.UPDATE} if exchanges == "weights" else _SPLIT
    labels = resolved(training.protocol).labels
    if (why := misplaced(training, exchanges=exchanges, labels=str(labels))) is not None:
        return why
    for name, _ in training.defense.stack:
        protects = DEFENSES[name].protects
        if exchanges == "split" and labels not in DEFENSES[name].labels:
            return unlabelled(DEFENSES[name](), str(labels))
        if not protects & sent:
            fitting = [key for key, other in DEFENSES.items() if other.protects & sent]
            return (
                f"{name} protects {', '.join(sorted(protects))} messages but "
                f"{training.protocol.name} sends {', '.join(sorted(sent))}; "
                f"use {' or '.join(fitting)}"
            )
    return None


def answer_key(prepared: Prepared, bottom: Arrays | None) -> AnswerKey:
    """Return the private truth behind a run.

    Args:
        prepared: The run.
        bottom: Its last bottom, where the protocol has one.

    Returns:
        Everything the oracle needs to score attacks on it.
    """
    dataset, rows = prepared.data.dataset(), prepared.data.split()
    public_images, public_labels = prepared.data.owned()
    starts = torch.tensor([0, *(len(part) for part in rows.nodes)]).cumsum(0)
    if prepared.data.aligned:
        starts = torch.zeros_like(starts)  # every party's batches name the same rows
    return AnswerKey(
        images=dataset.images[rows.private],
        labels=dataset.labels[rows.private],
        test_images=dataset.images[rows.test],
        test_labels=dataset.labels[rows.test],
        order=_order(prepared, rows.nodes, starts),
        num_classes=len(dataset.classes),
        public_images=public_images,
        public_labels=public_labels,
        bottom=bottom,
        parties=prepared.data.nodes if prepared.data.aligned else 1,
        classes=dataset.classes,
    )


def _order(
    prepared: Prepared, nodes: tuple[Int[Tensor, " _"], ...], starts: Int[Tensor, " _"]
) -> dict[tuple[int, int, int], list[int]]:
    protocol = prepared.settings.protocol
    return {
        (partition, round_, step): (starts[partition] + batch).tolist()
        for partition, part in enumerate(nodes)
        for round_ in range(1, protocol.rounds + 1)
        for step, batch in enumerate(prepared.cell(partition).batches(round_, len(part)))
    }
