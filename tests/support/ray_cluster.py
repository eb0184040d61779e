"""A Ray cluster whose machines are raylets of this one; tests may add some and take them away."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray
from ray.cluster_utils import Cluster


@contextmanager
def cluster_here() -> Iterator[Cluster]:
    """Start a head of one CPU, which the variable RAY_ADDRESS names meanwhile."""
    with pytest.MonkeyPatch.context() as variables, warnings.catch_warnings():
        variables.setenv("RAY_USAGE_STATS_ENABLED", "0")
        warnings.simplefilter("ignore", ResourceWarning)  # as Ray leaves files open
        # "auto" finds a cluster by a file of this machine, or by a variable. The file stays
        # unwritten: a Ray that another process starts meanwhile would join by it.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray._private.utils, "write_ray_address", lambda *_: None)
            made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        variables.setenv("RAY_ADDRESS", made.address)
        yield made
        made.shutdown()
        gc.collect()
