"""Whether a Ray cluster answers at an address, asked before Ray itself is.

Ray tries again for minutes where nobody answers, and has a traceback at the end.
"""

import os
import socket

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
