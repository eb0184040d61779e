"""How the nodes train, as a settings file says it; and what all strict settings share."""

from collections.abc import Mapping
from importlib import import_module
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from experiments.settings.catalogues import protocol_names
from experiments.settings.plugins import import_path
from leakbed.lookup import unknown_name
from leakbed.plugins import is_own

OPTIONS = ("sync", "gradient_scale", "merge")  # settings of some protocols alone
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
    """How the nodes train.

    Keys that may be None take the protocol's own default, and are refused where a split protocol
    does not have them.

    Attributes:
        name: A protocol of the catalogue.
        rounds: Of the server.
        batch_size: Rows of a batch.
        local_steps: Of a node in a round; None is one pass over its rows.
        optimizer: Of the nodes and of the server.
        learning_rate: Its step.
        momentum: Of SGD.
        weight_decay: L2 penalty on weights.
        fraction: Share of the nodes that train in a round.
        labels: Who holds the labels in a split protocol.
        bottoms: Whether the server can read a bottom that travels on to the next node.
        optimizer_state: Whether a node's optimiser goes on between rounds.
        sync: Of parallel-split: when bottoms are averaged.
        gradient_scale: Of parallel-split: whether a gradient is of the mean over all nodes' rows.
        merge: Of vertical-split: how the parties' smashed data are put together.
        timeout: Seconds a node may take for one message before the run stops.
    """

    name: str = "fedavg"
    rounds: int = Field(default=1, ge=1, le=_MOST)
    batch_size: int = Field(default=32, ge=1)
    local_steps: int | None = Field(default=None, ge=1, le=_MOST)
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    fraction: float = Field(default=1.0, gt=0, le=1)
    labels: Literal["shared", "server", "client"] | None = None
    bottoms: Literal["sealed", "relayed"] | None = None
    optimizer_state: Literal["kept", "fresh"] | None = None
    sync: Literal["step", "round"] | None = None
    gradient_scale: Literal["global", "local"] | None = None
    merge: Literal["concat", "sum"] | None = None
    timeout: float = Field(default=3600.0, gt=0)

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str) -> str:
        if is_own(path := import_path("protocols", name)):
            options = import_module("strategies").find_protocol(path).options
            if unknown := sorted(set(options) - set(OPTIONS)):
                raise ValueError(
                    f"{path} has the option {unknown[0]!r}, for which [protocol] has no key; "
                    f"legal: {', '.join(OPTIONS)}. Make one Protocol for each of its values, with "
                    "build = functools.partial(build, ...)"
                )
        elif name not in protocol_names():
            message = unknown_name("protocol", name, protocol_names())
            raise ValueError(f"{message}; or 'package.module:name' for your own")
        return path
