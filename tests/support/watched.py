"""Cards of runs with detectors, as the runner writes them."""

from collections.abc import Callable
from typing import Any

from experiments.results.cards import Card


def finding(alarm: int | None, score: float | None, **more: Any) -> dict[str, Any]:
    """What one detector found at one node."""
    return {"alarm": alarm, "score": score, "last": score, "gradients": 150, **more}


def watched(
    make_card: Callable[..., Card],
    nodes: dict[str, dict[str, Any]],
    *,
    hijacked: bool = False,
    adversary: Any = None,
    own: dict[str, Any] | None = None,
    **changes: Any,
) -> Card:
    """A card whose nodes had the detectors that found something there."""
    names = list(dict.fromkeys(name for found in nodes.values() for name in found))
    settings: dict[str, Any] = {"defense": {"stack": [[name, own or {}] for name in names]}}
    if hijacked:
        settings["adversary"] = adversary or {"name": "fsha", "own": {}}
    return make_card(
        defense="+".join(names),
        settings=settings,
        detection={"hijacked": hijacked, "nodes": nodes, "stopped": None},
        **changes,
    )
