"""Ray's side of :class:`~leakbed.grids.ray.grid.RayGrid`: starting Ray, and the actors in it.

A worker imports the ClientApp by name, from the driver's own folders in the driver's order, so that
it runs the same files. Sent by value instead, an app would travel with every message.

Whether a cluster answers at an address is asked before Ray itself is: Ray tries again for minutes
where nobody answers, and has a traceback at the end.

A worker sees the GPUs of its share alone and may take its share of their memory: Ray counts
fractions of GPUs but enforces nothing, so that one worker could starve its neighbours.
"""

import ctypes
import gc
import logging
import math
import os
import platform
import re
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import ray
from flwr.clientapp import ClientApp

from leakbed.errors import OURS
from leakbed.grids.ray.parcels import Parcel, Returned

LOCAL, AUTO = "local", "auto"
_SECONDS = 5.0  # a machine that is there answers within one, over any network


class NoClusterError(ValueError):
    """No Ray cluster answers at an address."""


def answering(address: str) -> str:
    """Return the address of a cluster that answers.

    Args:
        address: ``host:port``, ``ray://host:port``, ``"local"`` to start Ray on this machine, or
            ``"auto"`` for the cluster that the variable RAY_ADDRESS or a file of Ray's names.

    Returns:
        The same; of ``"auto"`` the one it stands for.

    Raises:
        NoClusterError: It is no address, nobody answers there, or who answers is not Ray.
    """
    if address == LOCAL:
        return address
    found = _chosen(address)
    if found == LOCAL:
        return found
    asked = repr(address) if found == address else f"{address!r}, which stands for {found!r}"
    host, port = _parted(found, asked)
    try:
        with socket.create_connection((host, port), timeout=_SECONDS):
            pass
    except (OSError, UnicodeError) as error:
        raise NoClusterError(
            f"no Ray cluster answers at ray_address {asked} ({error}); start one there with `ray "
            "start --head`, or leave ray_address out to start Ray on this machine alone"
        ) from error
    if not _speaks(host, port):
        raise NoClusterError(
            f"what answers at ray_address {asked} is no Ray cluster; give the address that `ray "
            "start --head` prints, whose port is 6379 unless you chose another"
        )
    return found


def _chosen(address: str) -> str:
    """Return what ``"auto"`` stands for."""
    if address != AUTO:
        return address
    if chosen := os.environ.get("RAY_ADDRESS"):
        return chosen
    from ray._private import services  # noqa: PLC0415  Ray's own rule, which it keeps to itself

    try:
        return str(services.get_ray_address_from_environment(AUTO, None))
    except ConnectionError as error:
        raise NoClusterError(
            f"ray_address {AUTO!r} finds no Ray cluster on this machine; start one with `ray start "
            "--head`, or leave ray_address out to start Ray for this run alone"
        ) from error


def _parted(address: str, asked: str) -> tuple[str, int]:
    """Return host and port of an address."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdecimal() or int(port) > 65535:  # noqa: PLR2004
        raise NoClusterError(
            f"ray_address {asked} is no address; write host:port, such as 10.0.0.1:6379, "
            f"ray://host:port, or {AUTO!r} for the cluster of this machine"
        )
    return host.strip("[]"), int(port)


def _speaks(host: str, port: int) -> bool:
    """Say whether what listens speaks gRPC, as Ray does."""
    if os.environ.get("RAY_USE_TLS", "0") not in {"", "0"}:
        return True  # it speaks to those with its certificate only
    import grpc  # noqa: PLC0415  comes with Flower; only clusters need it here

    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    channel = grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(timeout=_SECONDS)
    except grpc.FutureTimeoutError:
        return False
    finally:
        channel.close()
    return True


_ROUNDING = 1e-9  # 1 / 0.1 is 10
# Bytes that travel with a call or an answer; more lie in Ray's store, which costs an exchange 5 ms.
# Ray's own limit of 100 kB is below a batch of images at an early cut; from 2 MB on copying costs
# as much as the store.
_WITH_CALL = 2 << 20
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
START_SECONDS = 300.0  # importing torch takes 20 on a busy machine, over 120 from a cold disk


class AppNotImportableError(ValueError):
    """A ClientApp that another process cannot import."""


class NoWorkersError(RuntimeError):
    """Ray cannot host the workers asked for."""


class NoRoomError(ValueError):
    """More workers, or larger shares of a GPU, than all of Ray has room for."""


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
    if address is not None:
        address = answering(address)
    # Ray reads this where it starts; a cluster that runs already has made its own choice.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's 15 would give the cores to whatever else runs before its workers, and to the driver.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_max_direct_call_object_size", str(_WITH_CALL))
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
    most, _ = room(num_gpus)
    return max(1, min(nodes, most))


def equal_share(workers: int) -> float:
    """Return the GPU share of each of some workers that use every GPU Ray counts.

    Args:
        workers: How many there will be.

    Returns:
        As many on each GPU as are needed, and one share more, which is left over for the driver:
        it trains the server's part and attacks. Ray may put more workers on one GPU than on
        another, so which GPU the share is left on is Ray's choice. Where Ray counts no GPU, a
        :class:`NoRoomError`.
    """
    return 1 / (math.ceil(workers / counted_gpus()) + 1)


def counted_gpus() -> int:
    """Return how many GPUs Ray counts.

    Returns:
        At least 1.

    Raises:
        NoRoomError: It counts none.
    """
    if not (gpus := int(ray.cluster_resources().get("GPU", 0))):
        raise NoRoomError(
            "equal shares of the GPUs are asked for, but Ray counts none; set device = 'cpu', or "
            "gpus_per_worker (num_gpus) = 0, which leaves the nodes alone on CPUs"
        )
    return gpus


def refuse_crowd(workers: int, *, num_gpus: float) -> None:
    """Refuse workers that Ray could never place, rather than wait for them.

    Args:
        workers: How many are to start.
        num_gpus: GPU share of each.

    Raises:
        NoRoomError: All of Ray has fewer CPUs or GPUs, or the share is none that Ray knows.
    """
    if num_gpus > 1 and num_gpus != int(num_gpus):
        raise NoRoomError(
            f"num_gpus = {num_gpus}: beyond 1, Ray knows whole GPUs only; set gpus_per_worker to a "
            "share of 0 to 1, or to a whole number"
        )
    most, there = room(num_gpus)
    if workers > most:
        found = f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs"
        if num_gpus and not there.get("GPU"):
            found = f"{there.get('CPU', 0):g} CPUs and no GPU"
        raise NoRoomError(
            f"{workers} workers of 1 CPU and {num_gpus} GPU have no room: Ray counts {found}; set "
            "fewer workers or a smaller gpus_per_worker (num_gpus), which is 0 without GPUs"
        )


def room(num_gpus: float) -> tuple[int, dict[str, float]]:
    """Return how many processes of one CPU fit into all of Ray, and what all of it has.

    Args:
        num_gpus: GPU share of each.

    Returns:
        The count, of what there is and not of what is free; and Ray's resources by name.
    """
    # Not what is free at this moment: Ray takes a while to count a closed grid's CPUs as free.
    there: dict[str, float] = ray.cluster_resources()
    most, gpus = int(there.get("CPU", 0)), there.get("GPU", 0)
    if num_gpus > 1:
        most = min(most, int(gpus / num_gpus))
    elif num_gpus:
        most = min(most, int(gpus) * int(1 / num_gpus + _ROUNDING))  # no share spans two GPUs
    return most, there


class Recipe:
    """How to start one more actor of a grid; what it starts with is stored in Ray once."""

    def __init__(self, app: ClientApp | str, roster: dict[int, int], *, num_gpus: float) -> None:
        """Prepare; nothing starts yet.

        Args:
            app: What every node runs.
            roster: Partition id by node id, of all nodes of the grid.
            num_gpus: GPU share of each actor.
        """
        self.app = str(app) if isinstance(app, str) else app_path(app)
        self.num_gpus = num_gpus
        self._place = here()
        self._kind = ray.remote(_worker_class())
        self._roster = ray.put(roster)

    def start(self) -> Any:  # noqa: ANN401  Ray is untyped
        """Return a new actor, which may take its time to be there."""
        kind = self._kind.options(num_cpus=1, num_gpus=self.num_gpus)
        return kind.remote(*self._place, self.app, self._roster, self.num_gpus)


def start_workers(recipe: Recipe, *, workers: int) -> tuple[list[Any], frozenset[str]]:
    """Start the actors and wait until every one has imported the app.

    Args:
        recipe: Of each.
        workers: How many.

    Returns:
        The actors' handles, and the types of messages whose requests the app also takes by
        themselves.

    Raises:
        NoWorkersError: If Ray has no room for them, or one does not start.
    """
    actors = [recipe.start() for _ in range(workers)]
    try:
        kinds = ray.get([actor.ready.remote() for actor in actors], timeout=START_SECONDS)
    except ray.exceptions.GetTimeoutError as error:
        stop(actors)
        raise NoWorkersError(
            f"{workers} workers of 1 CPU and {recipe.num_gpus} GPU did not start within "
            f"{START_SECONDS} s; Ray has {ray.cluster_resources()}, of which free: "
            f"{ray.available_resources()}; ask for fewer workers or a smaller num_gpus"
        ) from error
    except ray.exceptions.RayError as error:
        stop(actors)
        raise NoWorkersError(
            f"a worker could not start with {recipe.app!r}: {_own_words(error)}"
        ) from error
    return actors, kinds[0]


def _own_words(error: Exception) -> str:
    """Return what an error of ours says, which needs no traceback; of another all that Ray says."""
    ours = rf"^(?:{'|'.join(sorted(OURS))})\.[\w.]+: (.*)"
    found = re.search(ours, str(error), re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else str(error)


def stop(actors: list[Any]) -> None:
    """End the actors, also those in the middle of a message."""
    for actor in actors:
        ray.kill(actor)


def here() -> tuple[list[str], dict[str, str]]:
    """Return where this process finds code, and the variables that change what code does."""
    environment = {k: v for k, v in os.environ.items() if k.startswith("LEAKBED_")}
    environment["OMP_NUM_THREADS"] = "1"  # for a torch that a handler imports later
    path = [os.path.abspath(entry) for entry in sys.path]  # noqa: PTH100  Path("") is no cwd
    return path, environment


def moving() -> Callable[[list[str], dict[str, str]], None]:
    """Return what lets a process of Ray's find the code that :func:`here` was called with.

    Ray sends it by value because it is local: the process has yet to find this module.
    """

    def move(path: list[str], environment: dict[str, str]) -> None:
        import os  # noqa: PLC0415  both: this code arrives before its imports can be found
        import sys  # noqa: PLC0415

        # A package anywhere on the path hides a folder of its name that is no package, so
        # what Ray adds (the folder it was started in) must go; the interpreter's own may stay.
        own = [entry for entry in sys.path if entry.startswith((sys.prefix, sys.base_prefix))]
        sys.path[:] = [*path, *(entry for entry in own if entry not in path)]
        os.environ.update(environment)

    return move


def _worker_class() -> type:
    """Return the actors' class, which Ray sends by value because it is local.

    By reference, a worker would have to find the leakbed package before it is told where it is, and
    might find another one in the folder it was started in.
    """
    move = moving()

    class Worker:
        def __init__(
            self,
            path: list[str],
            environment: dict[str, str],
            app: str,
            roster: dict[int, int],
            num_gpus: float,
        ) -> None:
            move(path, environment)

            from leakbed.flower_internals import task_identity  # noqa: PLC0415
            from leakbed.grids.ray.actors import (  # noqa: PLC0415  by name
                end_with_ray,
                hide_gpus,
                one_thread,
                take_share,
            )
            from leakbed.grids.ray.parcels import ParcelHost  # noqa: PLC0415
            from leakbed.lookup import import_object  # noqa: PLC0415

            end_with_ray()
            if not num_gpus:
                hide_gpus()
            self._host = ParcelHost(import_object(app), roster)  # type: ignore[arg-type]
            if num_gpus:
                take_share(num_gpus)

            one_thread()
            self._identity = task_identity()
            self._identity.__enter__()  # for good: this process serves one grid

        def ready(self) -> frozenset[str]:
            """Answer, which proves that the app was imported."""
            return self._host.kinds

        def handle(self, sent: list[Any], shared: Parcel | None = None) -> list[Returned]:
            return self._host.handle(sent, shared)

    return Worker


def end_with_ray() -> None:
    """Let Linux end this process with the one of Ray's that started it.

    Ray's own workers look whether their parent has become process 1, which it never does where a
    session's own process adopts orphans, as systemd does on a desktop. A process whose starter
    ended before Linux was told ends here.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
    starter = int(os.environ.get("RAY_RAYLET_PID", os.getppid()))
    # In a container, or under `uv run`, the parent is another process between this one and Ray's.
    if os.getppid() != starter and not _runs(starter):
        os.kill(os.getpid(), signal.SIGKILL)


def _runs(process: int) -> bool:
    """Say whether a process of this machine runs; one that nobody has waited for does not."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2]
    except OSError:
        return False
    return fields.split()[0] not in {"Z", "X"}  # state, after the name in parentheses: proc(5)


def one_thread() -> None:
    """Let torch compute in this thread alone, where it is loaded: an app may do without."""
    if "torch" in sys.modules:
        from leakbed.tensors import configure_torch  # noqa: PLC0415  likewise

        configure_torch()


def hide_gpus() -> None:
    """Let this process see no GPU; call it before anything looks for one."""
    # Ray does so too where a worker has no share, but has announced that one day it will not.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def take_share(share: float) -> None:
    """Make sure of the GPU that Ray gave this process, and cap the memory torch may take of it.

    Args:
        share: Of that GPU; from 1 on there is nobody to leave room for.

    Raises:
        UnavailableDeviceError: There is none to be seen: ``"auto"`` would compute on the CPU, in an
            experiment whose cards name a GPU.
    """
    import torch  # noqa: PLC0415  workers without a GPU may not need it

    if not torch.cuda.is_available():
        from leakbed.tensors import UnavailableDeviceError  # noqa: PLC0415  it needs torch

        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise UnavailableDeviceError(
            f"Ray gave this process {share:g} of a GPU (CUDA_VISIBLE_DEVICES = {given!r}), but "
            f"PyTorch {torch.__version__} sees none there; look at nvidia-smi and the driver of "
            f"{platform.node()}, or set gpus_per_worker = 0 or device = 'cpu'"
        )
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share)
