import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from leakbed import seeds
from leakbed.seeds import derive, generator, guarded, scoped


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_streams_are_a_pure_function_of_seed_and_role() -> None:
    digest = hashlib.sha256(b"3/node/1").digest()
    assert derive(3, "node/1") == int.from_bytes(digest[:8], "little") % 2**63
    roles = [derive(seed, role) for seed in range(20) for role in ("a", "b", "node/1", "node/11")]
    assert len(set(roles)) == 80
    assert all(0 <= stream < 2**63 for stream in roles)


def test_seed_and_role_do_not_run_into_each_other() -> None:
    assert derive(1, "1/x") != derive(11, "/x")


def test_a_generator_stands_at_the_start_of_its_stream() -> None:
    one, two = (torch.rand(5, generator=generator(2**63 - 1)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.rand(5, generator=generator(0)))


@pytest.mark.parametrize("stream", [0, 2**63 - 1])
def test_scoped_seeds_every_global_generator(stream: int) -> None:
    with scoped(stream):
        one = draws()
    with scoped(stream):
        two = draws()
    with scoped(stream // 2 + 1):
        other = draws()
    assert one == two
    assert all(a != b for a, b in zip(one, other, strict=True))


def draw_and_fail(manager: Any) -> None:
    with manager():
        draws()
        torch.manual_seed(9)
        raise KeyError


@pytest.mark.parametrize("manager", [guarded, lambda: scoped(4)])
def test_leaving_restores_what_was_there_also_after_an_error(manager: Any) -> None:
    with scoped(1):
        expected = draws()
    with scoped(1):
        with pytest.raises(KeyError):
            draw_and_fail(manager)
        assert draws() == expected


def test_guarded_does_not_seed() -> None:
    with scoped(1):
        expected = draws()
    with scoped(1), guarded():
        assert draws() == expected


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.Generator]:
    """A CUDA that has not started yet: its generator, which nothing can seed before."""
    device, started = torch.Generator().manual_seed(77), [False]

    def start() -> None:
        started[0] = True

    for name, does in {
        "is_available": lambda: True,
        "is_initialized": lambda: started[0],
        "init": start,
        "manual_seed_all": device.manual_seed,
        "get_rng_state_all": lambda: [device.get_state()],
        "set_rng_state_all": lambda states: device.set_state(states[0]),
    }.items():
        monkeypatch.setattr(torch.cuda, name, does)
    seeds._cuda_started.cache_clear()
    yield device
    seeds._cuda_started.cache_clear()


def test_cuda_that_would_start_inside_a_block_is_seeded_and_restored(cuda: torch.Generator) -> None:
    expected = torch.rand(3, generator=torch.Generator().manual_seed(77))
    with scoped(5):
        one = torch.rand(3, generator=cuda)
    with guarded():
        torch.rand(3, generator=cuda)
    with scoped(5):
        two = torch.rand(3, generator=cuda)
    assert torch.equal(one, two)
    assert torch.equal(torch.rand(3, generator=cuda), expected)
