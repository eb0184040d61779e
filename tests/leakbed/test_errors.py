"""Expected errors have a code and lines; bugs keep their traceback."""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from experiments.results.cards import CardError
from leakbed.errors import BAD_INPUT, FAILED, INTERRUPTED, naming_folder, verdict
from leakbed.grids.base import NodeFailed
from leakbed.testbed import MissingTestbedError


def test_an_interrupt_says_that_cells_stay() -> None:
    assert verdict(KeyboardInterrupt()) == (
        INTERRUPTED,
        ["interrupted: finished cells stay; the same command resumes"],
    )


def test_our_value_errors_are_bad_input_with_every_line() -> None:
    assert verdict(CardError("one\ntwo")) == (BAD_INPUT, ["error: one", "error: two"])


def test_our_other_errors_are_failed_runs() -> None:
    assert verdict(NodeFailed(3, "train.step", "it died")) == (
        FAILED,
        ["error: node 3 failed on 'train.step': it died"],
    )
    assert verdict(MissingTestbedError("no torch")) == (FAILED, ["error: no torch"])


def test_every_fault_of_a_validation_is_a_line() -> None:
    class Strict(BaseModel):
        nodes: int
        name: str

    with pytest.raises(ValidationError) as caught:
        Strict.model_validate({"nodes": "many"})
    code, lines = verdict(caught.value) or (0, [])
    assert code == BAD_INPUT
    assert len(lines) == 2
    assert lines[0].startswith("error: nodes: Input should be a valid integer")
    assert lines[0].endswith("(got 'many')")
    assert lines[1].startswith("error: name: Field required")


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, FAILED), (errno.EACCES, FAILED), (errno.ENOTDIR, BAD_INPUT), (errno.EIO, None)],
)
def test_the_machines_own_refusals_name_the_file(number: int, code: int | None) -> None:
    found = verdict(OSError(number, "refused", "some/file"))
    assert found == (None if code is None else (code, ["error: refused: some/file"]))
    nameless = (FAILED, ["error: refused"]) if number == errno.ENOSPC else None
    assert verdict(OSError(number, "refused")) == nameless


def test_a_full_disk_under_safetensors_is_one_line() -> None:
    class SafetensorError(Exception):
        pass

    full = SafetensorError("Error while serializing: I/O error: No space left on device")
    assert verdict(full) == (FAILED, [f"error: {full}"])
    assert verdict(SafetensorError("Error while deserializing header")) is None


def test_a_full_disk_names_the_folder_that_was_written_to(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        pass

    full = os.strerror(errno.ENOSPC)
    for error in (OSError(errno.ENOSPC, full), SafetensorError(f"I/O error: {full}")):
        with pytest.raises(OSError, match=full) as caught, naming_folder(tmp_path):
            raise error
        assert verdict(caught.value) == (FAILED, [f"error: {full}: {tmp_path}"])
    for other in (OSError(errno.ENOSPC, full, "a/file"), OSError(errno.EPIPE, "x"), KeyError("x")):
        with pytest.raises(type(other)) as passed, naming_folder(tmp_path):
            raise other
        assert passed.value is other
        assert getattr(other, "filename", None) in {None, "a/file"}


@pytest.mark.parametrize("bug", [ValueError("x"), TypeError("x"), RuntimeError("x"), KeyError("x")])
def test_anything_else_is_a_bug(bug: Exception) -> None:
    assert verdict(bug) is None


def raised(module: str) -> ValueError:
    """The error of a dataclass of some module that refuses its settings."""

    @dataclass
    class Refusing:
        value: int

        def __post_init__(self) -> None:
            raise ValueError("value is 3")

    scope = Refusing.__post_init__.__globals__
    here = scope["__name__"]
    scope["__name__"] = module
    try:
        with pytest.raises(ValueError, match="value is 3") as caught:
            Refusing(3)
        found = verdict(caught.value)
    finally:
        scope["__name__"] = here
    return ValueError(found)


def test_a_plugin_that_refuses_its_settings_is_bad_input() -> None:
    assert raised("attacks.baselines").args == ((BAD_INPUT, ["error: value is 3"]),)
    assert raised("numpy.core").args == (None,)


def test_a_plugin_may_leave_the_refusal_to_a_function_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(clip: float) -> None:
        raise ValueError(f"mine needs a finite clip > 0, got {clip}")

    def __post_init__() -> None:  # noqa: N807  where dataclasses refuse their settings
        refuse(-1.0)

    monkeypatch.setitem(globals(), "__name__", "defenses.mine")
    with pytest.raises(ValueError, match="clip") as caught:
        __post_init__()
    assert verdict(caught.value) == (
        BAD_INPUT,
        ["error: mine needs a finite clip > 0, got -1.0"],
    )


def test_what_a_library_raises_while_settings_are_checked_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def __post_init__() -> None:  # noqa: N807  where dataclasses refuse their settings
        json.loads("no JSON")

    monkeypatch.setitem(globals(), "__name__", "attacks.calling")
    with pytest.raises(ValueError, match="Expecting value") as caught:
        __post_init__()
    assert verdict(caught.value) is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 5.4 GiB for an array"),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    ],
)
def test_a_lack_of_memory_is_one_line_with_what_to_do(error: Exception) -> None:
    found = verdict(error)
    assert found is not None
    code, (line,) = found
    assert code == FAILED
    assert line.startswith("error: out of memory")
    assert "data.image_size" in line
    assert ("gpus_per_worker" in line) == ("CUDA" in str(error))
    assert ("stack" in line) == ("CUDA" in str(error))
