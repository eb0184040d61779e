"""A Flower deployment on loopback: the processes a user would start, and nothing of them left over.

One ``flower-superlink`` and some ``flower-supernode`` start processes of their own, which start one
more for every message. All of them inherit an environment that names a home of this deployment
only, by which they are found again, whatever became of their parents. Linux only: reads ``/proc``.
"""

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.support.certificates import LOOPBACK, certify
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
START, STOP = 300.0, 120.0  # seconds; both take about 2 where nothing else runs
TAIL = 4000  # characters of each log in an error


class DeploymentError(RuntimeError):
    """A deployment did not start, run or end as it should; the message ends with its logs."""


class Deployment:
    """A SuperLink and its SuperNodes, all connections with TLS; a context manager."""

    def __init__(self, folder: Path, *, nodes: int) -> None:
        """Prepare a deployment.

        Args:
            folder: For its home and its logs; empty.
            nodes: How many SuperNodes; their partition ids are 0, 1, ...
        """
        self._folder, self._nodes = folder.resolve(), nodes
        self._home = self._folder / "home"
        self._link, *self._ports = free_ports(nodes + 1)
        self._services: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Deployment":
        self._home.mkdir(parents=True)
        certify(self._certificates)
        trusted = f'root-certificates = "{self._certificates / "ca.crt"}"'
        connection = f'[superlink.loopback]\naddress = "{self._address}"\n{trusted}\n'
        (self._home / "config.toml").write_text(connection)
        try:
            self._start()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Stop everything; complain of what is left only where nothing else went wrong.

        Args:
            *error: What went wrong, as Python tells it.

        Raises:
            DeploymentError: A process had to be killed.
        """
        left = self._stop()
        if left and error[0] is None:
            raise DeploymentError(f"processes left behind: {left}\n{self.logs()}")

    def flwr_run(self, experiment: Path, out: Path, *, timeout: float) -> None:
        """Run an experiment of ours, as :meth:`flwr_run_app` does any app.

        Args:
            experiment: Its settings file.
            out: Where results go; the ServerApp runs elsewhere, so that both become absolute.
            timeout: Seconds it may take.
        """
        config = f'experiment="{experiment.resolve()}" out="{out.resolve()}"'
        self.flwr_run_app(ROOT, config, timeout=timeout)

    def flwr_run_app(self, app: Path, config: str, *, timeout: float) -> None:
        """Run an app as ``flwr run . loopback --stream`` does.

        Flower exits with 0 even where the run failed: look at the results, and at :meth:`logs`.

        Args:
            app: Its folder.
            config: Its run config.
            timeout: Seconds it may take.

        Raises:
            DeploymentError: It did not end in time, or ``flwr`` itself failed.
        """
        run = self._popen("flwr", "run", app, "loopback", "--stream", "--run-config", config)
        try:
            code = run.wait(timeout)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait(STOP)
            raise DeploymentError(f"no end within {timeout} s\n{self.logs()}") from None
        if code:
            raise DeploymentError(f"flwr run ended with {code}\n{self.logs()}")

    def logs(self) -> str:
        """Return the end of every log, to be shown where something failed."""
        files = sorted(self._folder.glob("*.log"))
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-TAIL:]}" for f in files)

    def processes(self) -> dict[int, str]:
        """Return the command of every living process of this deployment, by process id."""
        return processes_of(self._home)

    @property
    def _certificates(self) -> Path:
        return self._folder / "certificates"

    def _security(self, *, node: bool) -> tuple[object, ...]:
        """Return how a service proves itself and whom it trusts."""
        made = self._certificates
        trusted = ("--root-certificates", made / "ca.crt") if node else ()
        return (
            *("--ssl-ca-certfile", made / "ca.crt", "--ssl-certfile", made / "server.pem"),
            *("--ssl-keyfile", made / "server.key", *trusted),
        )

    @property
    def _address(self) -> str:
        return f"{LOOPBACK}:{self._link}"

    @property
    def _environment(self) -> dict[str, str]:
        own = {
            "FLWR_HOME": str(self._home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            # Each message waits for the next look of the process that starts ClientApps: 1 s else.
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "NO_PROXY": LOOPBACK,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),  # for networks and data of the tests, which no bundle holds
        }
        return os.environ | own

    def _start(self) -> None:
        self._services.append(
            self._popen(
                *(
                    "flower-superlink",
                    *self._security(node=False),
                    "--host",
                    LOOPBACK,
                    "--port",
                    self._link,
                ),
                "--disable-runtime-dependency-installation",
            )
        )
        self._wait_for_link()
        for partition, port in enumerate(self._ports):
            # What the settings of these tests name; a node imports nothing else.
            listed = 'import-paths="tests.support.deployed_network:network"'
            config = f"partition-id={partition} num-partitions={self._nodes} {listed}"
            node = self._popen(
                *("flower-supernode", *self._security(node=True), "--superlink", self._address),
                *("--host", LOOPBACK, "--port", port, "--node-config", config),
            )
            self._services.append(node)

    def _popen(self, command: str, *arguments: object) -> subprocess.Popen[bytes]:
        number = len(list(self._folder.glob("*.log")))
        with (self._folder / f"{number}-{command}.log").open("wb") as log:
            return subprocess.Popen(  # noqa: S603
                [command, *map(str, arguments)],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _wait_for_link(self) -> None:
        def settled() -> bool:
            """Whether it answers, or has ended."""
            return self._services[0].poll() is not None or self._answers()

        with suppress(AssertionError):  # said below, with the logs
            until(settled, within=START)
        if not self._answers():
            raise DeploymentError(f"no SuperLink at {self._address}\n{self.logs()}")

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection((LOOPBACK, self._link), timeout=1):
            return True
        return False

    def _stop(self) -> dict[int, str]:
        """End all as a user would, SuperNodes first; return the processes that had to be killed."""
        for service in reversed(self._services):
            service.terminate()
            with suppress(subprocess.TimeoutExpired):
                service.wait(STOP)
        with suppress(AssertionError):  # what is left is killed
            until(lambda: not self.processes(), within=STOP)
        return self._kill()

    def _kill(self) -> dict[int, str]:
        killed = kill_all(self._home)
        for service in self._services:
            service.wait(STOP)
        return killed


def processes_of(home: Path) -> dict[int, str]:
    """Return the command of every living process whose Flower home this is, by process id."""
    mark = f"FLWR_HOME={home}".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is somebody else's
            if mark in (process / "environ").read_bytes().split(b"\0"):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(process.name)] = command.decode(errors="replace")
    return found


def kill_all(home: Path) -> dict[int, str]:
    """Kill every process whose Flower home this is; return their commands, by process id."""
    killed: dict[int, str] = {}

    def none_left() -> bool:
        left = processes_of(home)  # again and again: one may start another meanwhile
        killed.update(left)
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return not left

    until(none_left)
    return killed


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:  # all at once, so that no two are the same
            each.bind((LOOPBACK, 0))
        return [int(each.getsockname()[1]) for each in sockets]
