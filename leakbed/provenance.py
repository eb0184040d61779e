"""What a run ran on beside its settings and our code: its data and the user's own code.

Every process makes them anew. A function that draws without a seed, or numbers classes by a set,
returns other rows in each, and another folder on the path holds another module of the same name:
nodes would train on what the answer key does not hold. So each process says what it found, and all
must have found the same. Code counts by what it computes, as :mod:`leakbed.reach` reads it.
"""

import hashlib
import importlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Message

from leakbed.data.config import DataConfig
from leakbed.reach import reached, read
from leakbed.wire.messages import RAN_ON

if TYPE_CHECKING:
    from leakbed.models import Architecture


class CodeFolderError(ValueError):
    """The folder of a user's modules is none, or not the one they were found in."""


class EditedCodeError(RuntimeError):
    """A user's file that changed after this process imported it."""


def find_first(run_config: Mapping[str, object]) -> Path | None:
    """Let modules be found first in the folder that a run config of ``flwr run`` names.

    Args:
        run_config: Its ``code``, else the folder of ``experiment`` where that is absolute.

    Returns:
        The folder; None where neither names one.

    Raises:
        CodeFolderError: ``code`` is relative, or no folder.
    """
    code, experiment = (str(run_config.get(key) or "") for key in ("code", "experiment"))
    folder = Path(code) if code else Path(experiment).parent
    if code and not (folder.is_absolute() and folder.is_dir()):
        raise CodeFolderError(
            f"code = {code!r} is no folder, or not an absolute path; give that of the folder that "
            "holds your modules"
        )
    if not folder.is_absolute():
        return None
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
    return folder


def own_modules(paths: Iterable[str | None]) -> tuple[str, ...]:
    """Return the modules of those names that are a user's import paths, each once.

    Args:
        paths: ``package.module:name``; anything else is a key of a catalogue, or nothing.

    Returns:
        Their ``package.module``, in order.
    """
    return tuple(sorted({path.partition(":")[0] for path in paths if path and ":" in path}))


def code_digest(modules: tuple[str, ...]) -> str:
    """Return a checksum of the files that some modules reach: their names and contents.

    Args:
        modules: From :func:`own_modules`.

    Returns:
        Hexadecimal digits, whatever folder the files lie in; empty where there is no module.

    Raises:
        EditedCodeError: A file is another than when this process first asked. The process goes on
            running the code that it imported then, whose numbers must not bear the new code's key.
    """
    if not modules:
        return ""
    files = reached(modules)
    found = {name: read(file).digest for name, file in files.items()}
    for name, checksum in found.items():
        if _FIRST.setdefault(name, checksum) != checksum:
            raise EditedCodeError(
                f"{files[name]} was changed after this process imported it, and the code before is "
                "what goes on running; start a new process"
            )
    text = "\0".join(f"{name}\0{checksum}" for name, checksum in found.items())
    return hashlib.sha256(text.encode()).hexdigest()


_FIRST: dict[str, str] = {}  # by module: the checksum of its file when it was first asked for


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
    def here(
        cls,
        data: DataConfig,
        architecture: "Architecture",
        *,
        device: str = "",
        also: Iterable[str] = (),
    ) -> "RanOn":
        """Return what this process has.

        Args:
            data: The run's.
            architecture: Its network.
            device: Where it computes, in words.
            also: Names of the defences and attacks that play a part in it.

        Returns:
            Checksums. That of the data is computed once per process; of code that has changed since
            this process first asked, an :class:`~leakbed.provenance.EditedCodeError`.
        """
        modules = own_modules([data.name, data.public_from, architecture.name, *also])
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
