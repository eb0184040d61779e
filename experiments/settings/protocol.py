"""How the nodes train, as a settings file says it; and what all strict settings share."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from experiments.settings.catalogues import protocol_choices
from experiments.settings.plugins import import_path
from leakbed.lookup import unknown_name
from leakbed.plugins import is_own, unknown_plugin

_MOST = 1_000_000  # steps or rounds; the order of batches is laid out before training starts


class Strict(BaseModel):
    """Settings that refuse an unknown key, and name the nearest that is known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: object) -> object:
        if isinstance(given, Mapping):
            for key in given:
                if key not in cls.model_fields:
                    raise ValueError(unknown_name("key", str(key), cls.model_fields))
        return given


class ProtocolSettings(Strict):
    """How the nodes train: keys that every protocol has, and the options of the one named.

    Which options those are, and the legal values of ``labels``, ``bottoms`` and
    ``optimizer_state``, says the protocol's entry in the catalogue; what is left out or None takes
    its default.

    Attributes:
        name: A protocol of the catalogue.
        rounds: Of the server.
        batch_size: Rows of a batch.
        local_steps: Of a node in a round; left out, one pass over its rows.
        optimizer: Of the nodes and of the server.
        learning_rate: Its step.
        momentum: Of SGD.
        weight_decay: L2 penalty on weights.
        fraction: Share of the nodes that train in a round.
        labels: Who holds the labels in a split protocol; FedAvg reads neither this nor ``bottoms``.
        bottoms: Whether the server can read a bottom that travels on to the next node.
        optimizer_state: Whether a node's optimiser goes on between rounds; FedAvg's starts afresh.
        timeout: Seconds a node may take for one message before the run stops.
    """

    model_config = ConfigDict(extra="allow")

    name: str = "fedavg"
    rounds: int = Field(default=1, ge=1, le=_MOST)
    batch_size: int = Field(default=32, ge=1)
    local_steps: int | None = Field(default=None, ge=1, le=_MOST)
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    fraction: float = Field(default=1.0, gt=0, le=1)
    labels: str = ""
    bottoms: str = ""
    optimizer_state: str = ""
    timeout: float = Field(default=3600.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: object) -> object:
        """Leave out choices that are None, as cards have those that a protocol lacks."""
        if not isinstance(given, Mapping):
            return given
        every = {key for legal in protocol_choices().values() for key in legal}
        return {k: value for k, value in given.items() if value is not None or k not in every}

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str) -> str:
        path = import_path("protocols", name)
        if not is_own(path) and path not in (known := protocol_choices()):
            form = "package.module:name"
            raise ValueError(unknown_plugin("protocols", "protocol", path, known, form=form))
        return path

    @model_validator(mode="after")
    def _takes_what_its_protocol_has(self) -> "ProtocolSettings":
        """Refuse other keys and values, and fill in defaults; ``model_fields_set`` has none."""
        legal = choices(self.name)
        common, options = self.__dict__, cast("dict[str, Any]", self.__pydantic_extra__)
        for key in options:
            if key not in legal:
                said = unknown_name(f"key of protocol {self.name}", key, {*common, *legal})
                if "name" not in self.model_fields_set:
                    said += f"; {self.name} is the default: write another's name beside its options"
                raise ValueError(said)
        for key, values in legal.items():
            place = common if key in common else options
            given = place[key] if key in self.model_fields_set else values[0]
            place[key] = _legal(self.name, key, given, values)
        return self

    @model_serializer(mode="wrap")
    def _given(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        """Leave out options that nobody set where what nobody set is left out."""
        every: dict[str, Any] = handler(self)
        return {
            k: v for k, v in every.items() if not info.exclude_unset or k in self.model_fields_set
        }

    @property
    def chosen(self) -> dict[str, Any]:
        """What is chosen of each key of the protocol's entry, its own options among them."""
        every = {**self.__dict__, **(self.model_extra or {})}
        return {key: every[key] for key in choices(self.name)}

    def replaced(self, overrides: Mapping[str, Any]) -> "ProtocolSettings":
        """Return what a case or a sweep makes of these settings.

        Args:
            overrides: Values by key. Where they name another protocol, the options of this one do
                not go with it.

        Returns:
            The settings; what is not legal in them is a ``ValidationError``.
        """
        given = self.model_dump(exclude_unset=True)
        common = {key: given[key] for key in given if key in ProtocolSettings.model_fields}
        made = ProtocolSettings(**{**common, **overrides})
        return made if made.name != self.name else ProtocolSettings(**{**given, **overrides})


def choices(protocol: str) -> Mapping[str, tuple[Any, ...]]:
    """Return what one may choose of a protocol; one of one's own is imported for it.

    What cannot be imported is an :class:`~leakbed.lookup.ImportPathError`.

    Args:
        protocol: A catalogue key, or ``package.module:name``.

    Returns:
        Key to legal values, the default first.

    Raises:
        ValueError: An option of it has the name of a key that every protocol has.
    """
    if not is_own(protocol):
        return protocol_choices()[protocol]
    entry = import_module("strategies").find_protocol(protocol)
    if taken := sorted(entry.options.keys() & ProtocolSettings.model_fields.keys()):
        raise ValueError(
            f"{protocol} has an option {taken[0]!r}, which is a key of every protocol; call it "
            "otherwise"
        )
    found: Mapping[str, tuple[Any, ...]] = entry.choices
    return found


def _legal(protocol: str, key: str, given: object, values: tuple[Any, ...]) -> object:
    """Return the legal value that one stands for; 1 is 1.0, and no yes."""
    for each in values:
        if each == given and isinstance(each, bool) == isinstance(given, bool):
            return each
    raise ValueError(f"{key} = {given!r}: {protocol} takes {' or '.join(map(repr, values))}")
