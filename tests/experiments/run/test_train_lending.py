"""The grid of an experiment is the one its settings name."""

import pytest

from experiments.run.train import grids_of
from experiments.settings.load import load_settings
from leakbed.grids import LocalGrid


def test_a_local_grid_has_the_nodes_asked_for() -> None:
    settings = load_settings({"name": "small", "attack": [{"name": "constant-image"}]})
    with grids_of(settings)(nodes=3) as (grid, roster):
        assert isinstance(grid, LocalGrid)
        assert sorted(roster.values()) == [0, 1, 2]


@pytest.mark.parametrize(("gpu_here", "share"), [(True, None), (False, 0.0)])
def test_ray_is_started_with_the_workers_asked_for_and_the_device_that_the_keys_name(
    monkeypatch: pytest.MonkeyPatch, *, gpu_here: bool, share: float | None
) -> None:
    seen = {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu_here)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)

    class Pretended:
        def __init__(self, app: object, **settings: object) -> None:
            del app
            seen.update(settings)
            self.roster = {1: 0}

        def __enter__(self) -> "Pretended":
            return self

        def __exit__(self, *reason: object) -> None:
            seen["ended"] = True

    monkeypatch.setattr("leakbed.grids.ray.grid.RayGrid", Pretended)
    table = {"name": "small", "grid": "ray", "workers": 2, "attack": [{"name": "constant-image"}]}
    with grids_of(load_settings(table))(nodes=1) as (_, roster):
        assert roster == {1: 0}
    assert seen == {"nodes": 1, "workers": 2, "num_gpus": share, "address": None, "ended": True}
