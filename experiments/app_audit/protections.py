"""What protects an app's updates, and the update that its server learns all the same.

Defences are named by what the app's code imports and calls; that none is found proves nothing, as a
client is a stranger's. Under secure aggregation (Flower's SecAgg+) a single node's vector is masked
and says nothing. The server adds them up and sends the new model out, and the difference of two
models that it sent is the mean update of all nodes: one update over the rows of all.

Gradients of weights that a node sends by that name, rather than weights, are an update as well: the
weights that it was sent, less the gradients. Their step size is 1, which no attack is told.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, cat

from leakbed.events import Arrays, Gradients, UpdateUp, WeightsDown
from leakbed.tap.facts import UNKNOWN_DEFENSE
from leakbed.tap.trace import Recorder, Trace

SUM = 0  # stands for all nodes; Flower numbers no node so
_SIGNS = {
    "opacus": "opacus (DP-SGD)",
    "PrivacyEngine": "opacus (DP-SGD)",
    "tensorflow_privacy": "tensorflow_privacy",
    "LocalDpMod": "LocalDpMod",
    "fixedclipping_mod": "fixedclipping_mod",
    "adaptiveclipping_mod": "adaptiveclipping_mod",
    "secagg_mod": "SecAgg",
    "secaggplus_mod": "SecAgg+",
    "leakbed.mods": "a defence of Leakbed's",
}
_WRAPPERS = re.compile("DifferentialPrivacy(Client|Server)Side(Fixed|Adaptive)Clipping")


def defenses_in(bundle: Path, imported: Iterable[str]) -> list[str]:
    """Return the defences that an app's code names, or that its run imported.

    Args:
        bundle: The app's folder.
        imported: Packages that defend, as its run was seen to import them.

    Returns:
        Their names, each once.
    """
    named = set(imported)
    for file in bundle.rglob("*.py"):
        inside = file.relative_to(bundle).parts
        if not file.is_file() or any(_is_foreign(part) for part in inside[:-1]):
            continue
        try:
            named |= set(_names(ast.parse(file.read_bytes())))
        except (SyntaxError, ValueError):  # a file that Python cannot run defends nothing
            continue
    found = {_SIGNS[name] for name in named if name in _SIGNS}
    return sorted(found | {name for name in named if _WRAPPERS.fullmatch(name)})


def _is_foreign(folder: str) -> bool:
    """Say whether a folder holds an environment or a tool's files, not the app's own."""
    return folder.startswith(".") or folder in {"site-packages", "node_modules"}


def defense_of(bundle: Path, imported: Iterable[str], assumed: list[str]) -> str:
    """Return what a card calls the defence of an app, and say how far that is known.

    Args:
        bundle: The app's folder.
        imported: Packages that defend, as its run was seen to import them.
        assumed: Gets a line.

    Returns:
        The names of what was found, or that none is known.
    """
    found = defenses_in(bundle, imported)
    if found:
        assumed.append(f"defence: the app's code names {', '.join(found)}; there may be others")
        return ", ".join(found)
    assumed.append("defence: not known; the client's code may defend in ways not looked for")
    return UNKNOWN_DEFENSE


@dataclass(frozen=True, kw_only=True, eq=False)
class Summed:
    """The mean updates of all nodes, as a trace of their own.

    Attributes:
        trace: One update a round, of node :data:`SUM`.
        facts: What is to be said of the run: batches and steps of all nodes together.
        fed: What all nodes fed their networks, as that of node :data:`SUM`.
        assumed: What was taken for true, in words.
    """

    trace: Trace
    facts: Mapping[str, Any]
    fed: Mapping[str, Tensor]
    assumed: str


def summed(
    trace: Trace, seen: Mapping[str, Any], fed: Mapping[str, Tensor], folder: Path
) -> Summed | None:
    """Return what the server of a secure aggregation learns, as updates of one node.

    Args:
        trace: Of messages whose updates are masked.
        seen: What the run showed: batches by node and round.
        fed: What networks were fed, by node and round.
        folder: Where the new trace goes.

    Returns:
        The updates; None if no message told the model after a round, or if no node's batches were
        seen.
    """
    batches: dict[int, dict[int, list[int]]] = {}
    for place, sizes in seen["batches"].items():
        node, round_ = map(int, place.split("/"))
        batches.setdefault(round_, {})[node] = sizes
    updates = [each for each in _differences(trace) if each[0] in batches]
    if not updates:
        return None
    joined: dict[str, Tensor] = {}
    with Recorder(folder, tapped=trace.tapped) as recorder:
        for round_, before, after in updates:
            rows = sum(sum(sizes) for sizes in batches[round_].values())
            recorder(UpdateUp(node=SUM, round=round_, before=before, after=after, examples=rows))
            for kind in ("images", "labels"):
                parts = [fed.get(f"{node}/{round_}/{kind}") for node in sorted(batches[round_])]
                whole = [part for part in parts if part is not None]
                if len(whole) == len(parts):
                    joined[f"{SUM}/{round_}/{kind}"] = cat(whole)
    last = batches[updates[-1][0]]
    steps = max(map(len, last.values()))
    size = sum(max(sizes) for sizes in last.values())
    rows = sum(map(sum, last.values()))  # each as often as it was fed
    how = (
        "exact where all have as many rows, up to the rounding of the masked vectors"
        if steps == 1
        else f"which is near what {steps} steps on the batches of all together would be"
    )
    return Summed(
        trace=Trace(folder),
        facts={"batch_size": size, "local_steps": steps, "partitions": None, "nodes": 1},
        fed=joined,
        assumed=(
            "single nodes cannot be attacked: SecAgg+ masks what they send; the sum is attacked as "
            f"one update over the {rows} rows of {len(last)} nodes, {how}"
        ),
    )


def of_gradients(trace: Trace, seen: Mapping[str, Any], folder: Path) -> Trace | None:
    """Return gradients that nodes sent of weights that they were sent, as updates.

    Args:
        trace: Of the app's messages.
        seen: What the run showed: batches by node and round.
        folder: Where the new trace goes.

    Returns:
        The updates; None if the app sent no such gradients.
    """
    sent: dict[int, Arrays] = {}
    updates: list[UpdateUp] = []
    for event in trace.events(WeightsDown, Gradients):
        if isinstance(event, WeightsDown):
            sent[event.node] = event.arrays
        elif isinstance(event, Gradients) and event.up:
            before = sent.get(event.node)
            if before is None or _shapes(before) != _shapes(event.arrays):
                continue
            rows = sum(seen["batches"].get(f"{event.node}/{event.round}", []))
            after = {name: value - event.arrays[name] for name, value in before.items()}
            updates.append(
                UpdateUp(
                    node=event.node,
                    round=event.round,
                    before=before,
                    after=after,
                    examples=rows or None,
                )
            )
    if not updates:
        return None
    with Recorder(folder, tapped=trace.tapped) as recorder:
        for update in updates:
            recorder(update)
    return Trace(folder)


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def _differences(trace: Trace) -> Iterator[tuple[int, Arrays, Arrays]]:
    """Yield each round whose model after it was sent out, with the models before and after."""
    first: dict[int, Arrays] = {}
    before: tuple[int, Arrays] | None = None
    for event in trace.events(WeightsDown):
        round_, arrays = event.round, event.arrays  # type: ignore[attr-defined]
        if before is not None and not _equal(before[1], arrays):
            yield before[0], before[1], arrays
            before = None
        if event.phase == "train" and round_ not in first:  # type: ignore[attr-defined]
            first[round_] = arrays
            before = round_, arrays


def _equal(one: Arrays, other: Arrays) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[k], other[k]) for k in one)


def _names(tree: ast.AST) -> Iterator[str]:
    """Yield every name that code imports or uses, and the packages of modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from (alias.name, alias.name.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            yield from (str(node.module), str(node.module).partition(".")[0])
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
