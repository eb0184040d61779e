from typing import Any

import pytest
import ray

from leakbed.grids.ray import calls
from leakbed.grids.ray.calls import CallFailedError, Worker, WorkerGoneError, answer, start


class Method:
    """An actor's method that returns what it was called with."""

    def remote(self, *given: Any) -> tuple[Any, ...]:
        return given


class Actor:
    handle = Method()


def test_a_broadcast_is_an_argument_of_its_own_so_that_ray_looks_it_up() -> None:
    worker, sent = Worker(0, Actor()), [((b"parcel",), None, False)]
    assert start(worker, sent, None) == (sent,)
    assert start(worker, sent, "reference") == (sent, "reference")


@pytest.mark.parametrize(
    ("raised", "seen", "said"),
    [
        (ray.exceptions.RayTaskError("handle", "", KeyError("x")), CallFailedError, "RayTaskError"),
        (ray.exceptions.ActorDiedError(), WorkerGoneError, "ActorDiedError"),
        (ray.exceptions.GetTimeoutError(), WorkerGoneError, "GetTimeoutError"),
    ],
    ids=["raised", "died", "never comes"],
)
def test_rays_errors_are_a_failed_call_or_a_worker_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, seen: type[Exception], said: str
) -> None:
    def get(_: object, timeout: float) -> None:
        assert timeout == calls.READ_SECONDS
        raise raised

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(seen, match=said):
        answer("ticket")
