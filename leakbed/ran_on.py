"""What a run ran on beside its settings and our code: its data and the user's own code.

Every process makes them anew. A function that draws without a seed, or numbers classes by a set,
returns other rows in each, and another folder on the path holds another module of the same name:
nodes would train on what the answer key does not hold. So each process says what it found, and all
must have found the same.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Message

from leakbed.data.recipe import DataRecipe
from leakbed.own_code import code_digest, own_modules, reached
from leakbed.wire.messages import RAN_ON

if TYPE_CHECKING:
    from leakbed.models import Architecture

_SHOWN = 12  # digits of a checksum in a message


class OtherInputsError(ValueError):
    """A process has other data or another module than the experiment."""


@dataclass(frozen=True, kw_only=True)
class RanOn:
    """Checksums of a run's data and code, and the names they belong to.

    Attributes:
        data: Of all images and labels.
        code: Of the files that the user's own modules reach; empty without any.
        name: ``data.name``.
        modules: The user's modules, joined by commas, with the files they were found in.
        device: Where the process computes, in words; may differ from one process to another.
    """

    data: str
    code: str
    name: str
    modules: str
    device: str = ""

    @classmethod
    def here(cls, data: DataRecipe, architecture: "Architecture", *, device: str = "") -> "RanOn":
        """Return what this process has.

        Args:
            data: The run's.
            architecture: Its network.
            device: Where it computes, in words.

        Returns:
            Checksums. That of the data is computed once per process; of code that has changed since
            this process first asked, an :class:`~leakbed.own_code.EditedCodeError`.
        """
        modules = own_modules([data.name, data.public_from, architecture.name])
        return cls(
            data=data.digest(),
            code=code_digest(modules),
            name=data.name,
            modules=_found(modules),
            device=device,
        )

    def record(self) -> ConfigRecord:
        """Return it as a Flower record."""
        return ConfigRecord({**asdict(self)})

    @classmethod
    def of(cls, reply: Message) -> "RanOn | None":
        """Return what a node says it has; None where it says nothing that can be read."""
        record = reply.content.get(RAN_ON)
        if not isinstance(record, ConfigRecord):
            return None
        found = {name: record.get(name) for name in cls.__dataclass_fields__}
        if not all(isinstance(value, str) for value in found.values()):
            return None
        return cls(**{name: str(value) for name, value in found.items()})

    def check(self, who: str, found: "RanOn | None") -> None:
        """Refuse a process that has something else.

        Args:
            who: Has it, in words.
            found: What it has.

        Raises:
            OtherInputsError: It says nothing, or has other code or other data.
        """
        if found is None:
            raise OtherInputsError(
                f"{who} does not say which data it has; every node must run the ClientApp "
                "clients:node_app of this version"
            )
        if found.code != self.code:
            raise OtherInputsError(
                f"{who} has other code of yours than the experiment: {found.modules}, where the "
                f"experiment has {self.modules}; make both the same, and start anew what keeps an "
                "earlier PYTHONPATH (a SuperLink, a SuperNode)"
            )
        if found.data != self.data:
            raise OtherInputsError(
                f"{who} has other data than the experiment: data.name = {self.name!r} gave "
                f"{found.data[:_SHOWN]}..., and {self.data[:_SHOWN]}... when the experiment was "
                "prepared. It must return the same rows in the same order in every process: draw "
                "with a fixed seed, and number classes in sorted() order rather than a set's"
            )


@lru_cache(maxsize=64)
def _found(modules: tuple[str, ...]) -> str:
    """Return modules with the files they were found in; once, since nodes are thousands."""
    files = reached(modules)
    return ", ".join(f"{name} ({files.get(name, 'no file of its own')})" for name in modules)
