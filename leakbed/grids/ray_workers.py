"""Ray's side of :class:`~leakbed.grids.ray_grid.RayGrid`: starting Ray, and the actors in it.

A worker imports the ClientApp by name, from the driver's own folders in the driver's order, so that
it runs the same files. Sent by value instead, an app would travel with every message.
"""

import gc
import logging
import os
import secrets
import sys
import warnings
from importlib.machinery import PathFinder
from typing import Any

import ray
from flwr.clientapp import ClientApp

from leakbed.grids.parcels import Parcel

START_SECONDS = 120.0  # importing torch on a busy machine takes 20


class AppNotImportableError(ValueError):
    """A ClientApp that another process cannot import."""


class NoWorkersError(RuntimeError):
    """Ray cannot host the workers asked for."""


def app_path(app: ClientApp) -> str:
    """Return the import path of an app.

    Args:
        app: Assigned to a module's attribute somewhere in this process.

    Returns:
        ``package.module:name``; of several, the shortest.

    Raises:
        AppNotImportableError: If no module a worker could import has it.
    """
    places = [
        f"{module.__name__}:{name}"
        for module in list(sys.modules.values())
        if hasattr(module, "__name__")
        for name, value in list(vars(module).items())
        if value is app
    ]
    importable = [p for p in places if PathFinder.find_spec(p.partition(".")[0].split(":")[0])]
    if importable:
        return min(importable, key=lambda path: (len(path), path))
    where = (
        "it is defined in the script that is running (__main__), which a worker cannot import"
        if any(place.startswith("__main__:") for place in places)
        else f"of the modules that have it ({places or 'none'}) none is on sys.path"
    )
    raise AppNotImportableError(
        f"RayGrid cannot send this ClientApp to its workers: {where}, and by value it would travel "
        "with every message; assign it to a name in a module of its own and import it from there"
    )


def start_ray(address: str | None, *, cpus: int | None) -> bool:
    """Connect to Ray unless this process already is.

    Args:
        address: Of a cluster; None starts one on this machine, whichever others run there.
        cpus: CPUs the started one should claim to have; None for those there are.

    Returns:
        Whether it must be shut down again.
    """
    if ray.is_initialized():
        return False
    # Ray reads this where it starts; a cluster that runs already has made its own choice.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with warnings.catch_warnings():
        # Ray leaves files open while it starts, and announces a default it will change one day.
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", FutureWarning)
        ray.init(
            address=address or "local",  # None would join what `ray start` left on this machine
            num_cpus=None if address else cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        gc.collect()  # some of those files lie in cycles
    return True


def stop_ray() -> None:
    """Disconnect from Ray, and end it if this process started it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray lets go of processes it has ended
        ray.shutdown()
        gc.collect()


def fitting_workers(nodes: int, *, num_gpus: float) -> int:
    """Return how many workers of one CPU each fit into all of Ray, at most one per node.

    Args:
        nodes: Nodes of the grid.
        num_gpus: GPU share of each worker.

    Returns:
        At least 1: whether that one fits shows when it starts.
    """
    # Not what is free at this moment: Ray takes a while to count a closed grid's CPUs as free.
    there = ray.cluster_resources()
    room = int(there.get("CPU", 0))
    if num_gpus:
        room = min(room, int(there.get("GPU", 0) / num_gpus))
    return max(1, min(nodes, room))


class Recipe:
    """How to start one more actor of a grid; what it starts with is stored in Ray once."""

    def __init__(
        self, app: ClientApp | str, roster: dict[int, int], *, num_gpus: float, shelf: str | None
    ) -> None:
        """Prepare; nothing starts yet.

        Args:
            app: What every node runs.
            roster: Partition id by node id, of all nodes of the grid.
            num_gpus: GPU share of each actor.
            shelf: Where actors and this process leave each other large arrays; None for Ray's.
        """
        self.shelf, self.key = shelf, secrets.token_bytes(32)
        self.app = str(app) if isinstance(app, str) else app_path(app)
        self.num_gpus = num_gpus
        environment = {k: v for k, v in os.environ.items() if k.startswith("LEAKBED_")}
        environment["OMP_NUM_THREADS"] = "1"  # for a torch that a handler imports later
        path = [os.path.abspath(entry) for entry in sys.path]  # noqa: PTH100  Path("") is no cwd
        self._kind = ray.remote(_worker_class())
        self._roster = ray.put(roster)
        self._place = path, environment

    def start(self) -> Any:  # noqa: ANN401  Ray is untyped
        """Return a new actor, which may take its time to be there."""
        kind = self._kind.options(num_cpus=1, num_gpus=self.num_gpus)
        limits = self.num_gpus, self.shelf, self.key
        return kind.remote(*self._place, self.app, self._roster, limits)


def start_workers(recipe: Recipe, *, workers: int) -> list[tuple[Any, str | None]]:
    """Start the actors and wait until every one has imported the app.

    Args:
        recipe: Of each.
        workers: How many.

    Returns:
        The actors' handles, and where each listens, if its calls are to come over a line.

    Raises:
        NoWorkersError: If Ray has no room for them, or one does not start.
    """
    actors = [recipe.start() for _ in range(workers)]
    try:
        addresses = ray.get([actor.ready.remote() for actor in actors], timeout=START_SECONDS)
    except ray.exceptions.GetTimeoutError as error:
        stop(actors)
        raise NoWorkersError(
            f"{workers} workers of 1 CPU and {recipe.num_gpus} GPU did not start within "
            f"{START_SECONDS} s; Ray has {ray.cluster_resources()}, of which free: "
            f"{ray.available_resources()}; ask for fewer workers or a smaller num_gpus"
        ) from error
    except ray.exceptions.RayError as error:
        stop(actors)
        raise NoWorkersError(f"a worker could not start with {recipe.app!r}: {error}") from error
    return list(zip(actors, addresses, strict=True))


def stop(actors: list[Any]) -> None:
    """End the actors, also those in the middle of a message."""
    for actor in actors:
        ray.kill(actor)


def _worker_class() -> type:
    """Return the actors' class, which Ray sends by value because it is local.

    By reference, a worker would have to find the leakbed package before it is told where it is, and
    might find another one in the folder it was started in.
    """

    class Worker:
        def __init__(
            self,
            path: list[str],
            environment: dict[str, str],
            app: str,
            roster: dict[int, int],
            limits: tuple[float, str | None, bytes],
        ) -> None:
            import os  # noqa: PLC0415  all of them: this code arrives before its imports can be found
            import sys  # noqa: PLC0415

            # A package anywhere on the path hides a folder of its name that is no package, so
            # what Ray adds (the folder it was started in) must go; the interpreter's own may stay.
            own = [entry for entry in sys.path if entry.startswith((sys.prefix, sys.base_prefix))]
            sys.path[:] = [*path, *(entry for entry in own if entry not in path)]
            os.environ.update(environment)

            from leakbed.flower_internals import task_identity  # noqa: PLC0415
            from leakbed.grids.gpu_shares import cap_memory, hide_gpus  # noqa: PLC0415
            from leakbed.grids.lines import listen, one_thread  # noqa: PLC0415
            from leakbed.grids.parcel_host import ParcelHost  # noqa: PLC0415
            from leakbed.grids.shelf import Shelf  # noqa: PLC0415
            from leakbed.naming import imported  # noqa: PLC0415

            num_gpus, folder, key = limits
            if not num_gpus:
                hide_gpus()
            self._host = ParcelHost(imported(app), roster, shelf=Shelf(folder) if folder else None)  # type: ignore[arg-type]
            if num_gpus:
                cap_memory(num_gpus)

            one_thread()
            self._identity = task_identity()
            self._identity.__enter__()  # for good: this process serves one grid
            self._address: str | None = None
            if folder:
                self._address = listen(self._host.handle, folder=folder, key=key)

        def ready(self) -> str | None:
            """Answer, which proves that the app was imported, and where the line is."""
            return self._address

        def handle(self, parcel: Parcel, shared: Parcel | None = None) -> Parcel:
            return self._host.handle(parcel, shared)

    return Worker
