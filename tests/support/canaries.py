"""Settings of small runs with canary labels, one for each kind of holder of labels."""

from pathlib import Path
from typing import Any

TABLE: dict[str, Any] = {
    "name": "small",
    "keep_rounds": "all",
    "ceiling": {"messages": 3, "draws": 2},
    "data": {"size": 300, "nodes": 2, "canaries": 120},
    "model": {"name": "mnistnet", "cut": 5},
    "protocol": {
        "name": "vanilla-split",
        "labels": "server",
        "batch_size": 16,
        "local_steps": 2,
        "rounds": 2,
        "optimizer": "adam",
        "learning_rate": 0.001,
    },
    "attack": [{"name": "similarity-distance", "collect": "first", "targets": 48, "partial": True}],
}
SMALL: dict[str, Any] = {
    **{key: value for key, value in TABLE.items() if key != "ceiling"},
    "data": {"size": 130, "nodes": 2, "canaries": 40},
    "attack": [{"name": "majority-label"}],
}
PLAIN = {**TABLE["protocol"], "batch_size": 8}
U_SHAPED: dict[str, Any] = {
    "protocol": {**PLAIN, "name": "u-shaped", "labels": "client"},
    "model": {"name": "mnistnet", "cut": 3, "upper_cut": 6},
}
STRIPS: dict[str, Any] = {
    "protocol": {**PLAIN, "name": "vertical-split", "merge": "sum"},
    "data": {**SMALL["data"], "image_size": 32},
    "model": {"name": "mnistnet", "cut": 6},
}
FEDAVG: dict[str, Any] = {
    "protocol": {k: v for k, v in PLAIN.items() if k != "labels"} | {"name": "fedavg"},
    "model": {"name": "mnistnet"},
}


def splitfed(name: str, **own: str) -> dict[str, Any]:
    return {"protocol": {**PLAIN, "name": name, **own}}


def only(folder: Path) -> Path:
    (found,) = (folder / "runs").iterdir()
    return found
