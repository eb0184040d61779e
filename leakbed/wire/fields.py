"""How each attribute of a message travels: the table from which messages are written and read.

A message class lists its attributes once, in ``FIELDS``: the record, the name in it, the type. Its
``records`` and ``of`` follow from that, and so does what a server accepts in a reply (see
:mod:`leakbed.wire.bounds`), so that neither can know a name the other does not.

What a node's detectors found is for whoever measures, so it travels sealed: no tap, trace or view
of the server holds it. A real client would tell nobody but its owner. That it trains no further it
says in the clear, for the server would notice.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, NamedTuple, Self

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from leakbed.events import Array, Arrays
from leakbed.wire.records import (
    BOTTOMS,
    CONFIG,
    METRICS,
    SEALED,
    WireError,
    as_arrays_under,
    bottom_of,
    config_of,
    describe,
    handed_over,
    int_field,
    pack,
    view_under,
    wire_bytes,
)

ALARMS, STOPPED = f"{SEALED}alarms", "stopped"
_GROUPS = "_groups"  # the attribute that keeps a message's groups; not pickled
OWN = "own"  # the record that says of which class a request of a protocol of one's own is


class Finding(NamedTuple):
    """What one detector has found so far.

    Attributes:
        alarm: After how many gradients it raised its alarm; -1 where it did not.
        score: Its most suspicious score; NaN before the first.
        last: Its latest score; NaN before the first.
        gradients: How many gradients it has seen.
    """

    alarm: int
    score: float
    last: float
    gradients: int


Alarms = Mapping[str, Finding]
"""By detector, what it found."""

_WHOLE = frozenset({"alarm", "gradients"})


def pack_alarms(alarms: Alarms) -> MetricRecord:
    """Return what detectors found as a Flower record."""
    record = MetricRecord()
    for name, finding in alarms.items():
        for field, value in finding._asdict().items():
            record[f"{name}.{field}"] = value
    return record


def alarms_of(message: Message) -> Alarms | None:
    """Return what the detectors behind a reply found, or None where there are none.

    Args:
        message: A reply of type ``train.split`` or ``train.backward``.

    Returns:
        By detector.

    Raises:
        WireError: If the record is no record of alarms.
    """
    if ALARMS not in message.content:
        return None
    record = message.content[ALARMS]
    if not isinstance(record, MetricRecord):
        raise WireError(f"{describe(message)} needs a MetricRecord under {ALARMS!r}")
    fields: dict[str, dict[str, Any]] = {}
    for key, value in record.items():
        name, _, field = key.rpartition(".")
        kinds = int if field in _WHOLE else int | float
        if field not in Finding._fields or not isinstance(value, kinds):
            raise WireError(f"{describe(message)}: {key!r} is no finding of a detector")
        fields.setdefault(name, {})[field] = value
    for name, found in fields.items():
        if len(found) < len(Finding._fields):
            raise WireError(f"{describe(message)}: the finding of {name!r} is not whole")
    return {name: Finding(**found) for name, found in fields.items()}


def stop_of(message: Message) -> str | None:
    """Return which detector stopped the sender of a reply, or None where it goes on.

    Args:
        message: Any reply that has content.

    Returns:
        The detector's name.

    Raises:
        WireError: If the record does not name one.
    """
    if STOPPED not in message.content:
        return None
    record = message.content[STOPPED]
    by = record.get("by") if isinstance(record, ConfigRecord) else None
    if not isinstance(by, str):
        raise WireError(f"{describe(message)} does not say under {STOPPED!r} what stopped the node")
    return by


Groups = dict[str, dict[str, Any]]
"""By record: what it holds, by name."""


class Field(ABC):
    """One attribute of a message on the wire."""

    @abstractmethod
    def write(self, value: Any, groups: Groups, message: "Carried") -> None:  # noqa: ANN401  the attribute's
        """Put a value that is not None where it travels."""

    @abstractmethod
    def read(self, message: Message) -> Any:  # noqa: ANN401  the attribute's
        """Return the value a message carries."""

    def hand_over(self, value: Any, message: "Carried") -> Any:  # noqa: ANN401  the attribute's
        """Return what :meth:`read` would of a message into which :meth:`write` put a value.

        Args:
            value: Not None.
            message: Whose attribute it is.

        Returns:
            The value itself, where it is none that its sender could change later.
        """
        del message
        return value


@dataclass(frozen=True)
class Whole(Field):
    """A whole number, which no message goes without.

    Attributes:
        record: ``CONFIG`` or ``METRICS``.
        key: Its name there.
    """

    record: str
    key: str

    def write(self, value: int, groups: Groups, message: "Carried") -> None:
        """Put the number into its record."""
        del message
        groups.setdefault(self.record, {})[self.key] = value

    def read(self, message: Message) -> int:
        """Return the number; one that is missing is a ``WireError``."""
        record = config_of(message) if self.record == CONFIG else _metrics(message)
        return int_field(message, record, self.key)

    def hand_over(self, value: int, message: "Carried") -> int:
        """Return the number, or refuse what is none.

        Args:
            value: The attribute's.
            message: Whose it is.

        Returns:
            The same.

        Raises:
            WireError: If it is no whole number.
        """
        if not isinstance(value, int):
            kind = type(message).__name__
            raise WireError(f"a {kind} needs a whole number {self.key!r}, got {value!r}")
        return value


@dataclass(frozen=True)
class Number(Field):
    """A finite number, such as a loss, which no message goes without.

    Attributes:
        record: ``CONFIG`` or ``METRICS``.
        key: Its name there.
    """

    record: str
    key: str

    def write(self, value: float, groups: Groups, message: "Carried") -> None:
        """Put the number into its record."""
        groups.setdefault(self.record, {})[self.key] = self.hand_over(value, message)

    def read(self, message: Message) -> float:
        """Return the number.

        Args:
            message: Any with the record.

        Returns:
            A finite number.

        Raises:
            WireError: If it is missing, or none.
        """
        record = config_of(message) if self.record == CONFIG else _metrics(message)
        number = record.get(self.key)
        if not isinstance(number, float) or not isfinite(number):
            raise WireError(f"{describe(message)} needs a number {self.key!r}, got {number!r}")
        return number

    def hand_over(self, value: float, message: "Carried") -> float:
        """Return the number, or refuse what is none.

        Args:
            value: The attribute's.
            message: Whose it is.

        Returns:
            The same.

        Raises:
            WireError: If it is no finite number.
        """
        if not isinstance(value, float) or not isfinite(value):
            kind = type(message).__name__
            raise WireError(f"a {kind} needs a finite number {self.key!r}, got {value!r}")
        return value


@dataclass(frozen=True)
class Share(Field):
    """A share of rows in (0, 1]; not sent where it is 1.

    Attributes:
        record: ``CONFIG``.
        key: Its name there.
    """

    record: str
    key: str

    def write(self, value: float, groups: Groups, message: "Carried") -> None:
        """Put a share below 1 into its record."""
        del message
        if value != 1:
            groups.setdefault(self.record, {})[self.key] = value

    def read(self, message: Message) -> float:
        """Return the share.

        Args:
            message: Any with a configuration.

        Returns:
            1 where it names none.

        Raises:
            WireError: If it is no number in (0, 1].
        """
        share = config_of(message).get(self.key, 1.0)
        if not isinstance(share, float) or not 0 < share <= 1:
            raise WireError(f"{describe(message)} needs a share of rows in (0, 1], got {share!r}")
        return share


@dataclass(frozen=True)
class Tensor(Field):
    """One array.

    Attributes:
        record: The key of its ``ArrayRecord``.
        name: Its name there.
        kinds: Legal kinds of number, as NumPy's ``dtype.kind`` names them.
        rank: How many dimensions it has; None for one or more.
        optional: Whether a record may lack it.
        missing: What a message without the record needs, in words; None where it may lack it.
        sent: Whether it ever travels; what a node's own mod adds on arrival does not.
    """

    record: str
    name: str
    kinds: str = "f"
    rank: int | None = None
    optional: bool = False
    missing: str | None = None
    sent: bool = True

    def write(self, value: Array, groups: Groups, message: "Carried") -> None:
        """Put the array into its record; one that is optional, into a record that is there."""
        del message
        if self.sent and (not self.optional or self.record in groups):
            groups.setdefault(self.record, {})[self.name] = value

    def read(self, message: Message) -> Array | None:
        """Return the array as a read-only view.

        Args:
            message: Any.

        Returns:
            None where the message may go without.

        Raises:
            WireError: If it may not.
        """
        array = view_under(message, self.record, self.name, needed=not self.optional)
        if array is None and self.missing is not None:
            raise WireError(f"{describe(message)} needs {self.missing}")
        return array

    def hand_over(self, value: Array, message: "Carried") -> Array | None:
        """Return a read-only copy; None of an array that would not travel."""
        if self.optional and self.name not in message.groups().get(self.record, ()):
            return None
        return handed_over(self.name, value)


@dataclass(frozen=True)
class Named(Field):
    """Arrays under the names of the model's weights.

    Attributes:
        record: The key of their ``ArrayRecord``.
        missing: What a message without them needs, in words.
    """

    record: str
    missing: str

    def write(self, value: Arrays, groups: Groups, message: "Carried") -> None:
        """Put the arrays into their record."""
        del message
        groups[self.record] = dict(value)

    def read(self, message: Message) -> Arrays:
        """Return the arrays as read-only views.

        Args:
            message: Any.

        Returns:
            By name.

        Raises:
            WireError: If there is no such record.
        """
        if (arrays := as_arrays_under(message, self.record)) is None:
            raise WireError(f"{describe(message)} needs {self.missing}")
        return arrays

    def hand_over(self, value: Arrays, message: "Carried") -> Arrays:
        """Return read-only copies."""
        del message
        return {name: handed_over(name, array) for name, array in value.items()}


@dataclass(frozen=True)
class Bottom(Field):
    """The node's part, under the key that says who may read it: the message's ``bottoms``.

    Attributes:
        missing: What a message without it needs, in words; None where it may go without.
    """

    missing: str | None = None

    def write(self, value: Arrays, groups: Groups, message: "Carried") -> None:
        """Put the part where it is sealed or relayed."""
        groups[BOTTOMS[getattr(message, "bottoms", "sealed")]] = dict(value)

    def read(self, message: Message) -> Arrays | None:
        """Return the part as read-only views.

        Args:
            message: Any.

        Returns:
            By name; None where the message may go without.

        Raises:
            WireError: If it may not.
        """
        bottom, _ = bottom_of(message)
        if bottom is None and self.missing is not None:
            raise WireError(f"{describe(message)} needs {self.missing}")
        return bottom

    def hand_over(self, value: Arrays, message: "Carried") -> Arrays:
        """Return read-only copies."""
        del message
        return {name: handed_over(name, array) for name, array in value.items()}


class Policy(Field):
    """Whether the bottom is ``"sealed"`` or ``"relayed"``, which its key says."""

    def write(self, value: str, groups: Groups, message: "Carried") -> None:
        """Do nothing: :class:`Bottom` takes the key."""

    def read(self, message: Message) -> str:
        """Return it; ``"sealed"`` where there is no bottom."""
        relayed = BOTTOMS["sealed"] not in message.content
        return "relayed" if relayed and BOTTOMS["relayed"] in message.content else "sealed"

    def hand_over(self, value: str, message: "Carried") -> str:
        """Return it; ``"sealed"`` where there is no bottom."""
        return "sealed" if getattr(message, "bottom", None) is None else value


class StoppedBy(Field):
    """The detector that stopped the node."""

    def write(self, value: str, groups: Groups, message: "Carried") -> None:
        """Put its name into the record that says so."""
        del message
        groups[STOPPED] = {"by": value}

    def read(self, message: Message) -> str | None:
        """Return its name; None where the node goes on."""
        return stop_of(message)


class Found(Field):
    """What detectors found; sealed, and not sent where there is none."""

    def write(self, value: Alarms, groups: Groups, message: "Carried") -> None:
        """Put the findings into their record."""
        del message
        if value:
            groups[ALARMS] = dict(pack_alarms(value).items())

    def read(self, message: Message) -> Alarms | None:
        """Return the findings, by detector; None where there are none."""
        return alarms_of(message)

    def hand_over(self, value: Alarms, message: "Carried") -> Alarms | None:
        """Return the findings; None where there are none."""
        del message
        return dict(value) or None


class Carried:
    """What travels in a message; subclasses are dataclasses.

    Attributes:
        FIELDS: By attribute, how it travels; what it writes first stands first in the message.
    """

    FIELDS: ClassVar[Mapping[str, Field]] = {}

    def groups(self) -> Groups:
        """Return what each record holds, by name, before anything is made bytes; made once."""
        made: Groups | None = vars(self).get(_GROUPS)
        if made is None:
            made = vars(self)[_GROUPS] = self._grouped()
        return made

    def _grouped(self) -> Groups:
        groups: Groups = {}
        for name, field in self.FIELDS.items():
            if (value := getattr(self, name)) is not None:
                field.write(value, groups, self)
        return groups

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != _GROUPS}

    def records(self) -> RecordDict:
        """Return the records that carry this message."""
        return RecordDict({key: _record(key, held) for key, held in self.groups().items()})

    def handed_over(self) -> Self:
        """Return this message as its receiver would read it, without making it bytes.

        What cannot travel is a :class:`~leakbed.wire.records.WireError`.

        Returns:
            Of the same class; arrays are read-only copies.
        """
        values = {}
        for name, field in self.FIELDS.items():
            value = getattr(self, name)
            values[name] = None if value is None else field.hand_over(value, self)
        return type(self)(**values)

    def array_bytes(self) -> int:
        """Return the bytes of its arrays as they travel, their names among them."""
        return sum(
            len(name) + wire_bytes(value)
            for key, held in self.groups().items()
            if key not in PLAIN
            for name, value in held.items()
        )

    @classmethod
    def of(cls, message: Message) -> Self:
        """Read what a message carries; arrays that the table does not name are not looked at.

        A record that is missing or of the wrong kind is a
        :class:`~leakbed.wire.records.WireError`.

        Args:
            message: Of the type that this class is for.

        Returns:
            It, with read-only views of the message's bytes for arrays.
        """
        return cls(**{name: field.read(message) for name, field in cls.FIELDS.items()})


PLAIN: Mapping[str, type[ConfigRecord | MetricRecord]] = {
    CONFIG: ConfigRecord,
    STOPPED: ConfigRecord,
    OWN: ConfigRecord,
    METRICS: MetricRecord,
    ALARMS: MetricRecord,
}
"""Records of numbers and names, by key; all others are of arrays."""


def _record(key: str, held: dict[str, Any]) -> ArrayRecord | ConfigRecord | MetricRecord:
    return PLAIN[key](held) if key in PLAIN else pack(held)


def _metrics(message: Message) -> MetricRecord:
    metrics = message.content.get(METRICS)
    if not isinstance(metrics, MetricRecord):
        raise WireError(f"{describe(message)} needs a MetricRecord under {METRICS!r}")
    return metrics
