"""Prepare a training run: build its parts and check them before anything is sent.

That is: what the protocol divides among nodes (rows, or the features of all rows), what defences
may know of the run so that they can refuse one they cannot protect, and which nodes are malicious.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from math import ceil
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from clients.malicious import begun, intruder_of, view_of
from clients.node import NodeConfig, TrainingPlan, smallest_batch, straddles
from defenses import DEFENSES
from experiments.run.rehearse import rehearse
from experiments.settings.cells import Training
from experiments.settings.protocol import ProtocolSettings
from experiments.settings.schema import SettingsError
from leakbed.contracts import Defense, Protects, select
from leakbed.contracts.defense import Run
from leakbed.contracts.gradient_defenses import refuse_order
from leakbed.contracts.hooks import refuse_uncalled
from leakbed.contracts.noise_laws import NoCeilingError
from leakbed.contracts.training_steps import refuse_stack
from leakbed.data.config import DataConfig
from leakbed.data.partitioning import ALIGNED, strip_architecture
from leakbed.events import Arrays
from leakbed.models import Architecture
from leakbed.objects import steady
from leakbed.oracle.truth import AnswerKey
from leakbed.plugins import picked
from leakbed.provenance import RanOn
from leakbed.seeds import derive
from leakbed.tensors import resolve_device
from strategies import find_protocol
from strategies.vertical_split import MERGES, party_architectures


def partition_of(training: Training) -> str:
    """Return who owns which rows: a setting, except where the protocol divides features.

    Args:
        training: The run's settings.

    Returns:
        The name of a partition.

    Raises:
        SettingsError: If the setting does not fit the protocol.
    """
    chosen, protocol = training.data, training.protocol.name
    if find_protocol(protocol).divides == "rows":
        if chosen.partition == ALIGNED:
            raise SettingsError(
                f"data.partition = {ALIGNED!r} gives every node all rows, but {protocol} divides "
                "rows; use 'iid' or another partition"
            )
        return chosen.partition
    if chosen.partition not in {"iid", ALIGNED} or chosen.alpha or chosen.partition_settings:
        raise SettingsError(
            f"every node of {protocol} has a strip of every row, so there is nothing to deal out: "
            f"leave out data.partition (it is {chosen.partition!r}), data.alpha and "
            "data.partition_settings"
        )
    return ALIGNED


def check_parties(training: Training, architecture: Architecture) -> None:
    """Refuse feature parties that would not all train, or whose smashed data do not merge.

    Illegal cuts raise :class:`~leakbed.models.IllegalCutError`. Other protocols are let through.

    Args:
        training: The run's settings.
        architecture: The uncut network.

    Raises:
        SettingsError: If only a share of the nodes would train in a round.
    """
    protocol = training.protocol
    if find_protocol(protocol.name).divides == "rows":
        return
    if protocol.fraction != 1:
        raise SettingsError(
            f"protocol.fraction = {protocol.fraction}: each party of {protocol.name} holds a share "
            "of every row, so all must train; leave it out"
        )
    if (merge := protocol.chosen.get("merge", "concat")) in MERGES:  # a stranger's is not known
        party_architectures(architecture, nodes=training.data.nodes, merge=merge)


def labels_of(data: DataConfig, partition: int) -> Int[Tensor, " rows"]:
    """Return the labels of a node's rows, in the order of the ids it names them by.

    Args:
        data: What the rows are a function of.
        partition: The node.

    Returns:
        What a server that holds the labels has of this node.
    """
    rows = data.split()
    return data.dataset().labels[rows.private if data.aligned else rows.nodes[partition]]


def passes_of(training: Training, *, rows: int) -> int:
    """Return in how many batches of a whole run one row of a node is, at most."""
    protocol = training.protocol
    steps, size = protocol.local_steps, protocol.batch_size
    return protocol.rounds * (1 if steps is None else ceil(steps * size / rows))


def check_defenses(
    defenses: tuple[Defense, ...],
    training: Training,
    architecture: Architecture,
    *,
    rows: tuple[int, ...],
) -> None:
    """Let every defence refuse the run; each raises its own error."""
    protocol = training.protocol
    for each in rows:
        for defense in defenses:
            defense.check(rows=each, batch_size=protocol.batch_size)
    refuse_stack(defenses)
    if not defenses or find_protocol(protocol.name).exchanges != "split":
        return
    size, steps = protocol.batch_size, protocol.local_steps
    for kind in (Protects.SMASHED, Protects.CUT_GRADIENT):
        refuse_order(select(defenses, kind))
    parts = architecture.parts(0)
    # Where parties hold strips, each of them is sent a gradient of the same row.
    parties = 1 if find_protocol(protocol.name).divides == "rows" else training.data.nodes
    for each in sorted(set(rows)):
        run = Run(
            classes=architecture.num_classes - training.model.extra_classes,
            rows=each,
            batch_size=size,
            steps=protocol.rounds * (ceil(each / size) if steps is None else steps),
            passes=parties * passes_of(training, rows=each),
            top=parts.top,
            bottom=parts.bottom,
            smallest_batch=smallest_batch(rows=each, batch_size=size, steps=steps),
            straddles=straddles(rows=each, batch_size=size, steps=steps),
        )
        for defense in defenses:
            defense.check_run(run)


def check_intruder(training: Training, cell: Callable[[int], NodeConfig]) -> None:
    """Refuse malicious nodes that there are not, and an intruder that does not fit them.

    Classes or images that do not fit are the intruder's own ``UnfitNodeError``.

    Args:
        training: The run's settings.
        cell: Gives what a node is told.

    Raises:
        SettingsError: If a node is unknown or named twice, or none is left to learn from.
    """
    if (chosen := training.intruder) is None:
        return
    nodes = range(training.data.nodes)
    if not set(chosen.nodes) < set(nodes) or len(set(chosen.nodes)) < len(chosen.nodes):
        raise SettingsError(
            f"attack {chosen.name}: nodes = {list(chosen.nodes)}; name some of the nodes 0 to "
            f"{nodes[-1]}, each once, and leave one that is honest"
        )
    told = cell(chosen.nodes[0])
    if (intruder := intruder_of(told)) is not None:
        begun(intruder, view_of(told), seed=0)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A training run's ingredients, checked before anything is sent.

    Attributes:
        settings: As the experiment has them.
        data: What the rows are a function of.
        architecture: The network.
        plan: How nodes train.
        ran_on: Its data and the user's code, as this process has them.
    """

    settings: Training
    data: DataConfig
    architecture: Architecture
    plan: TrainingPlan
    ran_on: RanOn

    @cached_property
    def defenses(self) -> tuple[Defense, ...]:
        """The run's defences, made once; a control run has its own.

        Values out of range raise the defence's own errors, and a hook that nobody would call is an
        :class:`~leakbed.contracts.hooks.UncalledHookError`.
        """
        stack = self.settings.defense.stack
        kinds = [picked(name, DEFENSES, "defence") for name, _ in stack]
        for kind in kinds:
            refuse_uncalled(kind)
        return tuple(kind(**own) for kind, (_, own) in zip(kinds, stack, strict=True))

    @property
    def fingerprint(self) -> str:
        """What a run depends on beside settings and our code: its data and the user's code."""
        return ":".join(part for part in (self.ran_on.data, self.ran_on.code) if part)

    def found(self, plugins: Iterable[str]) -> RanOn:
        """Return what this process has now, of code that of data, model and some plug-ins.

        Args:
            plugins: Names of defences and attacks; only import paths count.

        Returns:
            Checksums, as a node with those plug-ins finds them.
        """
        return RanOn.here(self.data, self.architecture, also=plugins)

    @property
    def public(self) -> Arrays | None:
        """Images and labels of the adversary's own; None where it has none."""
        images, labels = self.data.owned()
        return {"images": images.numpy(), "labels": labels.numpy()} if len(labels) else None

    def stream(self, role: str) -> int:
        """Return the stream of a role in this run."""
        return derive(self.settings.seed, role)

    def cell(self, partition: int) -> NodeConfig:
        """Return what one node is told; feature parties share the order of their rows."""
        nodes, seen, order = self.data.nodes, self.architecture, None
        if self.data.aligned and nodes > 1:
            seen = strip_architecture(seen, party=partition, parties=nodes)
            order = self.stream("order")
        return NodeConfig(
            data=self.data,
            architecture=seen,
            plan=self.plan,
            partition=partition,
            stream=self.stream(f"node/{partition}"),
            defense_stream=self.stream(f"defence/{partition}"),
            device=self.settings.device,
            order_stream=order,
            protocol=self._asking(),
            **self._intruder(partition),
        )

    def _asking(self) -> str:
        """Return the import path of a protocol with requests of its own, which nodes import."""
        name = self.settings.protocol.name
        return name if find_protocol(name).requests else ""

    def _intruder(self, partition: int) -> dict[str, Any]:
        """Return what makes a node malicious; it does not defend itself against anybody."""
        chosen = self.settings.intruder
        if chosen is None or partition not in chosen.nodes:
            return {"defenses": self.settings.defense.stack}
        stream = self.stream(f"adversary/{steady(chosen.name)}/{partition}")
        return {"intruder": (chosen.name, chosen.own), "intruder_stream": stream}


def prepare(training: Training, *, root: str | None) -> Prepared:
    """Load the data, build the network and refuse what cannot run, before training starts.

    Data, models, cuts and batches that do not fit raise the errors of :mod:`leakbed.data`,
    :mod:`leakbed.models` and :mod:`clients.node`.

    Args:
        training: The run's settings.
        root: Folder of downloaded data sets, or None.

    Returns:
        The run's ingredients.
    """
    model, protocol = training.model, training.protocol
    entry = find_protocol(protocol.name)
    data = _recipe(training, root)
    dataset = data.dataset()
    channels, height, width = dataset.images.shape[1:]
    architecture = Architecture(
        name=model.name,
        image_shape=(channels, height, width),
        num_classes=data.num_classes + model.extra_classes,
        activation=model.activation,
        initialisation=model.initialisation,
        cut=model.cut,
        upper_cut=model.upper_cut,
        linear_top=model.linear_top,
        settings=tuple(sorted(model.settings.items())),
    )
    prepared = Prepared(
        settings=training,
        data=data,
        architecture=architecture,
        plan=_plan(protocol),
        ran_on=RanOn.here(data, architecture, also=training.plugins()),
    )
    if entry.exchanges == "split":
        architecture.parts(0)  # refuses an illegal cut
    check_parties(training, architecture)
    data.canary_places()  # refuses more than there are rows
    _refuse_idle_canaries(prepared)
    data.owned()  # refuses a public set that does not fit
    sizes = tuple(map(len, data.split().nodes))
    for partition, rows in enumerate(sizes):
        prepared.cell(partition).batches(1, rows)
    rehearse(training, architecture, rows=sizes)
    check_defenses(prepared.defenses, training, architecture, rows=sizes)
    check_intruder(training, prepared.cell)
    resolve_device(training.device)
    return prepared


def _refuse_idle_canaries(prepared: Prepared) -> None:
    """Refuse canaries of which no ceiling could be said once the run is trained."""
    training = prepared.settings
    if not training.data.canaries:
        return
    from experiments.run.label_ceilings import refuse_no_game  # noqa: PLC0415  few runs need it

    try:
        refuse_no_game(
            protocol=training.protocol.name,
            labels=training.protocol.labels,
            bottoms=training.protocol.bottoms,
            defenses=prepared.defenses,
            classes=prepared.data.num_classes,
        )
    except NoCeilingError as error:
        raise SettingsError(f"data.canaries is {training.data.canaries}, but {error}") from error
    if training.intruder is not None:
        raise SettingsError(
            f"data.canaries is {training.data.canaries}, but no ceiling of labels is known where a "
            "malicious node makes its own batches; leave out one of them"
        )


def _recipe(training: Training, root: str | None) -> DataConfig:
    chosen = training.data
    own = dict(chosen.partition_settings)
    if chosen.alpha is not None:
        own["alpha"] = chosen.alpha
    return DataConfig(
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
        canaries=chosen.canaries,
        settings=tuple(sorted(chosen.settings.items())),
    )


def _plan(protocol: ProtocolSettings) -> TrainingPlan:
    """Return how nodes train; a setting that would be ignored is refused."""
    if protocol.optimizer == "adam" and protocol.momentum:
        raise SettingsError(f"protocol.momentum = {protocol.momentum} is SGD's; Adam has none")
    return TrainingPlan(
        **{each.name: getattr(protocol, each.name) for each in fields(TrainingPlan)}
    )


def answer_key(prepared: Prepared, bottom: Arrays | None) -> AnswerKey:
    """Return the private truth behind a run.

    Data that are no longer those the run began with raise
    :class:`~leakbed.provenance.OtherInputsError`.

    Args:
        prepared: The run.
        bottom: Its last bottom, where the protocol has one.

    Returns:
        Everything the oracle needs to score attacks on it.
    """
    prepared.ran_on.check("the answer key", prepared.found(prepared.settings.plugins()))
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
        canaries=tuple(prepared.data.canary_places().tolist()),
        seed=prepared.settings.seed,
        training={
            "plan": asdict(prepared.plan),
            "defenses": [[name, dict(own)] for name, own in prepared.settings.defense.stack],
            "intruder": prepared.settings.intruder is not None,
            "rows": [len(part) for part in rows.nodes],
            "partition": prepared.data.partition,
            "options": prepared.settings.protocol.chosen,
        },
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
