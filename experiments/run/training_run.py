"""A training run on disk: what a finished one holds, and where an unfinished one works.

The folder of a run holds ``trace/`` (what an adversary may have), ``answers/`` (what only the
oracle may open), of a hijacked run ``decoded.safetensors`` (what its adversary made of the smashed
data), of one with a malicious client ``samples.safetensors`` (what that client got), and a summary,
written last. A run that stops half-way leaves none of them in place.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from leakbed.errors import naming_folder
from leakbed.oracle.truth import AnswerKey
from leakbed.tap.trace import Trace

SUMMARY, DECODED, SAMPLES = "run.json", "decoded.safetensors", "samples.safetensors"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A finished training run on disk.

    Attributes:
        folder: Where it lies.
        utility: Test accuracy and the like.
        cost: Seconds and bytes.
        checkpoints: What an adversary beside it could decode while it trained, in order: the number
            of gradients it had forged or watched (``step``) and scores of the batch of that step.
        detection: What its nodes' detectors found, from :func:`experiments.run.alarms.found`; empty
            where they had none.
        smashed: What was measured of the smashed data themselves; empty where none were sent.
        seed: The run's; None where an earlier version wrote the summary.
        devices: What its nodes computed on, by the name of the device, each once; empty where an
            earlier version wrote the summary.
        held: Its trace and answer key in memory; None where they lie in its folder.
    """

    folder: Path
    utility: Mapping[str, float]
    cost: Mapping[str, float]
    checkpoints: Sequence[Mapping[str, float]] = ()
    detection: Mapping[str, Any] = field(default_factory=dict)
    smashed: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None
    devices: Sequence[str] = ()
    held: tuple[Trace, AnswerKey] | None = None

    def in_memory(self) -> "TrainingRun":
        """Return the run with trace and answer key in memory: its folder may go."""
        trace = Trace(self.trace)
        trace.hold()
        return replace(self, held=(trace, AnswerKey.read(self.answers)))

    def open_trace(self) -> Trace:
        """Return what an adversary may have, verified."""
        return Trace(self.trace) if self.held is None else self.held[0]

    def answer_key(self) -> AnswerKey:
        """Return what only the oracle may read."""
        return AnswerKey.read(self.answers) if self.held is None else self.held[1]

    @property
    def trace(self) -> Path:
        """What an adversary may have."""
        return self.folder / "trace"

    @property
    def answers(self) -> Path:
        """What only the oracle may open."""
        return self.folder / "answers"

    @property
    def decoded(self) -> Path:
        """What an active adversary made of the smashed data it saw last."""
        return self.folder / DECODED

    @property
    def samples(self) -> Path:
        """What a malicious client made of the training."""
        return self.folder / SAMPLES

    @classmethod
    def read(cls, folder: Path) -> "TrainingRun | None":
        """Return the finished run in a folder, or None if there is none."""
        try:
            return cls(folder=folder, **json.loads((folder / SUMMARY).read_text()))
        except (OSError, ValueError, TypeError):
            return None  # absent, or damaged: it is trained again


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Give a folder of this process's own to work in, and leave nothing of it behind.

    Args:
        folder: Where the finished run will be.

    Yields:
        A new, empty folder beside it.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{folder.name}{_UNFINISHED}-*"):
        process = int(left.suffix.rpartition("-")[2])
        if process == os.getpid() or not _alive(process):  # containers give the same number again
            shutil.rmtree(left, ignore_errors=True)
    work = folder.with_suffix(f"{_UNFINISHED}-{os.getpid()}")
    work.mkdir(mode=0o700)
    try:
        with naming_folder(folder.parent):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
