"""Addresses without a cluster are refused within seconds; no worker outlives its Ray."""

import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from threading import Thread
from time import monotonic

import pytest
import ray

from leakbed.grids.ray import actors
from leakbed.grids.ray.actors import NoClusterError, answering, end_with_ray, start_ray


@pytest.fixture
def silent() -> Iterator[str]:
    """Someone who listens, and answers with what Ray does not speak."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    met, _ = server.accept()
                except OSError:
                    return
                with met:
                    met.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_nobody_there_is_told_at_once_before_ray_is_asked(closed: str) -> None:
    begun = monotonic()
    with pytest.raises(NoClusterError, match=rf"no Ray cluster answers at ray_address '{closed}'"):
        start_ray(closed, cpus=None)
    with pytest.raises(NoClusterError, match="answers at ray_address 'ray://127"):
        answering(f"ray://{closed}")
    assert monotonic() - begun < 5


def test_somebody_else_is_no_cluster(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "_SECONDS", 1.0)
    with pytest.raises(NoClusterError, match=rf"answers at ray_address '{silent}' is no Ray"):
        answering(silent)
    monkeypatch.setenv("RAY_USE_TLS", "1")  # nobody can tell without the certificate
    assert answering(silent) == silent


@pytest.mark.parametrize(
    "address", ["", "here", "host:", ":6379", "host:port", "host:99999", "host:²", "10.0.0.1"]
)
def test_what_is_no_address_says_how_one_is_written(address: str) -> None:
    with pytest.raises(NoClusterError, match=r"is no address; write host:port"):
        answering(address)


@pytest.mark.parametrize("address", ["no.such.machine.invalid:6379", f"{'a' * 64}.b:6379"])
def test_a_machine_that_has_no_name_is_told(address: str) -> None:
    with pytest.raises(NoClusterError, match="no Ray cluster answers"):
        answering(address)


def test_auto_names_what_it_found(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", closed)
    with pytest.raises(NoClusterError, match=rf"'auto', which stands for '{closed}'"):
        answering("auto")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert answering("auto") == answering("local") == "local"


def test_auto_without_a_cluster_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services  # noqa: PLC0415

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    with pytest.raises(NoClusterError, match="finds no Ray cluster on this machine; start one"):
        answering("auto")


@pytest.mark.parametrize(("chosen", "seen"), [(None, str(2 << 20)), ("1000", "1000")])
def test_batches_travel_with_the_call_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, seen: str
) -> None:
    name = "RAY_max_direct_call_object_size"
    if chosen is None:
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, chosen)
    found: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: found.append(os.environ[name]))
    assert start_ray(None, cpus=1)
    assert found == [seen]


def ended_by(starter: int | None) -> int:
    """Return which signal ends a child that asks to end with its starter; 0 where it lives on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child starts no thread
        child = os.fork()
    if not child:
        try:
            os.environ.pop("RAY_RAYLET_PID", None)
            if starter is not None:
                os.environ["RAY_RAYLET_PID"] = str(starter)
            end_with_ray()
            os._exit(0)
        finally:
            os._exit(1)  # whatever was raised: these tests run in the parent
    return -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends a process with its parent")
def test_a_worker_whose_ray_ended_before_it_asked_ends_as_well() -> None:
    assert ended_by(os.getpid()) == ended_by(None) == 0, "the parent is Ray's own process"
    with subprocess.Popen(["sleep", "60"]) as ray_itself:  # noqa: S607  wherever it lies
        # Between the two stands a process of a container.
        assert ended_by(ray_itself.pid) == 0
        ray_itself.kill()
        os.waitid(os.P_PID, ray_itself.pid, os.WEXITED | os.WNOWAIT)
        assert ended_by(ray_itself.pid) == signal.SIGKILL, "it ended, and nobody knows yet"
    assert ended_by(ray_itself.pid) == signal.SIGKILL
