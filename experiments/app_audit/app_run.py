"""Run a stranger's Flower app as it stands in one process, tapped, and see what it is fed.

The app's own pyproject names its ServerApp, ClientApp and run config. Both apps get a wrapper: the
server's is :func:`leakbed.tap.tapped`, and the client's says which partition a node holds. What a
node feeds its network is seen by hooks on modules and losses, which change no value and draw
nothing; it is the owner's truth and goes beside the trace, never into it.

Departure from ``flwr run``: nodes run one after another on a LocalGrid, without Ray or a SuperLink.

    python -m experiments.app_audit.app_run BUNDLE OUT NODES NODE_CONFIG
"""

import json
import os
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from leakbed.events import Failed
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.lookup import ImportPathError, format_error, import_object
from leakbed.tap import Trace, tapped

TRACES, FED, SEEN = "traces", "fed.safetensors", "seen.json"
_MOST = 2**28  # bytes of fed inputs that are kept
_LOSSES = ("cross_entropy", "nll_loss")
_DEFENDING = ("opacus", "tensorflow_privacy")  # packages that an app imports to defend itself
_PARTITION = "{partition}"


class AppError(ValueError):
    """An app that cannot be run; the message is in words of the app."""


class Watched(ClientApp):
    """A client that runs as it would, while what it feeds its networks is noted.

    Attributes:
        inner: The app itself, once it is imported.
        partitions: Flower's partition id of each node seen.
        models: How often each class of outermost module was trained.
        batches: By node and round, the sizes of its training batches.
        fed: By node and round, what its networks and losses were given.
        normalised: Mean and spread of each ``Normalize`` that the app made.
        classes: Columns of the scores that losses were given.
    """

    def __init__(
        self, config: Mapping[str, Any], node_config: Mapping[str, Any] | None = None
    ) -> None:
        """Start to watch, before the app is imported.

        Args:
            config: The run's, which a LocalGrid does not hand to its nodes.
            node_config: What every node is configured with, beside its partition; in a text
                ``{partition}`` stands for its partition id.
        """
        super().__init__()
        self.inner: ClientApp = self
        self._config = config
        self._node_config = dict(node_config or {})
        self._one = Lock()  # the older strategies call their nodes from threads of their own
        self._place: tuple[int, int] | None = None
        self._depth = 0
        self._inputs: Tensor | None = None
        self._bytes = 0
        self._turns: Counter[int] = Counter()
        self.partitions: dict[int, int] = {}
        self.models: Counter[str] = Counter()
        self.batches: dict[tuple[int, int], list[int]] = {}
        self.fed: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        self.normalised: list[tuple[list[float], list[float]]] = []
        self.classes: set[int] = set()
        before = register_module_forward_pre_hook(self._enter)
        after = register_module_forward_hook(self._leave, always_call=True)
        self._undo: list[Callable[[], object]] = [before.remove, after.remove]
        for name in _LOSSES:
            loss = getattr(nn.functional, name)
            setattr(nn.functional, name, self._seeing(loss))
            self._undo.append(partial(setattr, nn.functional, name, loss))

    def __call__(self, message: Message, context: Context) -> Message:
        """Run the app on one message, one at a time."""
        with self._one:
            return self._answered(message, context)

    def _answered(self, message: Message, context: Context) -> Message:
        node = context.node_id
        context.run_config = dict(self._config)
        if "partition-id" in context.node_config:
            partition = int(context.node_config["partition-id"])
            self.partitions[node] = partition
            context.node_config.update(
                (key, _of_partition(value, partition)) for key, value in self._node_config.items()
            )
        if message.metadata.message_type.partition(".")[0] != "train":
            return self.inner(message, context)
        self._turns[node] += 1
        self._place = node, _round(message) or self._turns[node]
        self._depth = 0
        try:
            return self.inner(message, context)
        finally:
            self._place = self._inputs = None

    def watch_normalising(self) -> None:
        """Note what torchvision's ``Normalize`` is made with, where torchvision is installed."""
        try:
            from torchvision.transforms import Normalize  # noqa: PLC0415  apps may do without
        except ImportError:
            return
        made = Normalize.__init__

        def noted(self_: Any, mean: Any, std: Any, *more: Any, **named: Any) -> None:  # noqa: ANN401
            made(self_, mean, std, *more, **named)
            self.normalised.append(([float(e) for e in mean], [float(e) for e in std]))

        Normalize.__init__ = noted
        self._undo.append(partial(setattr, Normalize, "__init__", made))

    def close(self) -> None:
        """Watch no longer, and leave torch as it was."""
        while self._undo:
            self._undo.pop()()

    def _enter(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        self._depth += 1
        trains = self._depth == 1 and torch.is_grad_enabled() and not isinstance(module, _Loss)
        if self._place is None or not trains or not given or not isinstance(given[0], Tensor):
            return
        if any(parameter.requires_grad for parameter in module.parameters()):
            kind = type(module)
            self.models[f"{kind.__module__}:{kind.__qualname__}"] += 1
            self._inputs = given[0].detach()

    def _leave(self, *call: object) -> None:
        del call
        self._depth = max(self._depth - 1, 0)

    def _seeing(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        def seen(scores: Tensor, target: Tensor, *more: Any, **named: Any) -> Any:  # noqa: ANN401
            self._note(scores, target)
            return loss(scores, target, *more, **named)

        return seen

    def _note(self, scores: Tensor, target: Tensor) -> None:
        """Keep a batch and its labels, the first time its loss is computed."""
        inputs, self._inputs = self._inputs, None
        if self._place is None or inputs is None or target.is_floating_point():
            return
        if target.shape != inputs.shape[:1]:
            return
        self.classes.add(int(scores.shape[-1]))
        self.batches.setdefault(self._place, []).append(len(inputs))
        self._bytes += inputs.nbytes
        if self._bytes <= _MOST:
            pair = inputs.to("cpu", torch.float32).clone(), target.detach().cpu().long().clone()
            self.fed.setdefault(self._place, []).append(pair)


def run(
    bundle: Path, out: Path, *, nodes: int, node_config: Mapping[str, Any] | None = None
) -> None:
    """Run the app of a bundle and write its trace, what it fed its networks, and what was seen.

    Args:
        bundle: The app's folder, with its pyproject.
        out: Gets ``traces``, ``fed.safetensors`` and ``seen.json``.
        nodes: How many nodes.
        node_config: What every node is configured with: see :class:`Watched`.

    Raises:
        AppError: The app names no apps, or one cannot be imported or ended with an error.
    """
    server_path, client_path, config = components(bundle)
    sys.path.insert(0, str(bundle))
    os.chdir(bundle)
    torch.set_num_threads(1)
    watched = Watched(config, node_config)
    watched.watch_normalising()
    try:
        watched.inner, server = _loaded(client_path, ClientApp), _loaded(server_path, ServerApp)
    except AppError:
        watched.close()
        raise
    grid = _Running(watched, nodes=nodes)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    try:
        with task_identity():
            tapped(server, out / TRACES)(grid, context)
    except Exception as error:
        said = _first_reason(out / TRACES)
        raise AppError(
            f"the ServerApp {server_path!r} raised {format_error(error)}{said}"
        ) from error
    finally:
        watched.close()
        _write(watched, out)


def _of_partition(value: Any, partition: int) -> Any:  # noqa: ANN401  any value of a config
    return value.replace(_PARTITION, str(partition)) if isinstance(value, str) else value


def _first_reason(traces: Path) -> str:
    """Return what the first node that failed said, which is often why a server fails too."""
    for folder in traces.iterdir() if traces.is_dir() else ():
        for event in Trace(folder, partial=True).events(Failed):
            reason: str = event.reason  # type: ignore[attr-defined]
            return f"; before that node {event.node} said: {' '.join(reason.split())}"
    return ""


class _Running(LocalGrid):
    """A LocalGrid that knows of its run what the older strategies ask for."""

    @property
    def run(self) -> Any:  # noqa: ANN401  Flower's Run, of which they read the id alone
        return SimpleNamespace(run_id=1)


def components(bundle: Path) -> tuple[str, str, dict[str, Any]]:
    """Return the import paths of a bundle's ServerApp and ClientApp, and its run config.

    Args:
        bundle: A folder.

    Returns:
        All three, the config flattened as Flower does.

    Raises:
        AppError: It has no pyproject that names both.
    """
    file = bundle / "pyproject.toml"
    try:
        table = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise AppError(
            f"{file} cannot be read: {error}; name the folder of a Flower app"
        ) from error
    flower = table.get("tool", {}).get("flwr", {}).get("app", {})
    named = flower.get("components", {})
    if missing := [key for key in ("serverapp", "clientapp") if not named.get(key)]:
        raise AppError(
            f"{file} names no {missing[0]}; a Flower app has [tool.flwr.app.components] with "
            'serverapp = "package.server_app:app" and clientapp = "package.client_app:app"'
        )
    return named["serverapp"], named["clientapp"], _flat(flower.get("config", {}))


def _flat(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        inner = _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else None
        found |= {f"{before}{key}": value} if inner is None else inner
    return found


def _loaded(path: str, kind: type[Any]) -> Any:  # noqa: ANN401  an instance of it
    try:
        app = import_object(path)
    except ImportPathError as error:
        raise AppError(str(error)) from error
    if not isinstance(app, kind):
        raise AppError(f"{path!r} is a {type(app).__name__}, not a {kind.__name__}")
    return app


def _round(message: Message) -> int | None:
    """Return the round that a message says it belongs to."""
    for record in message.content.config_records.values():
        if isinstance(said := record.get("server-round"), int):
            return said
    group = str(message.metadata.group_id)
    return int(group) if group.isdecimal() else None


def _write(watched: Watched, out: Path) -> None:
    """Write what was seen; the inputs, which are private, for their owner alone."""
    tensors = {}
    for (node, round_), pairs in watched.fed.items():
        if len({images.shape[1:] for images, _ in pairs}) == 1:
            tensors[f"{node}/{round_}/images"] = torch.cat([images for images, _ in pairs])
            tensors[f"{node}/{round_}/labels"] = torch.cat([labels for _, labels in pairs])
    save_file(tensors, out / FED)
    seen = {
        "partitions": {str(node): place for node, place in watched.partitions.items()},
        "models": watched.models.most_common(),
        "batches": {f"{node}/{round_}": e for (node, round_), e in watched.batches.items()},
        "normalised": watched.normalised,
        "classes": sorted(watched.classes),
        "imported": [name for name in _DEFENDING if name in sys.modules],
    }
    (out / SEEN).write_text(json.dumps(seen))
    for name in (FED, SEEN):
        (out / name).chmod(0o600)


if __name__ == "__main__":
    try:
        told = json.loads(sys.argv[4])
        run(Path(sys.argv[1]), Path(sys.argv[2]), nodes=int(sys.argv[3]), node_config=told)
    except AppError as error:
        sys.exit(f"AppError: {error}")
