"""The GPU benchmark runs, on next to nothing; its attacks without Flower and without Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

pytestmark = pytest.mark.runtime

WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("flwr", "ray"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv = ["gpu", "attacks", "--small", "--device", "cpu"]
from benchmarks import gpu
gpu.main()
"""


def test_the_attacks_need_neither_flower_nor_ray() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", WITHOUT],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["name"].partition(",")[0] for line in lines] == [
        "dlm",
        "dlm-plus",
        "unsplit",
        "fsha",
    ]
    assert all(line["rate"] > 0 and line["device"]["type"] == "cpu" for line in lines)


def test_the_grids_are_a_line_for_each_number_of_workers() -> None:
    (line,) = gpu.lines(("grids",), torch.device("cpu"), targets=1, small=True)
    assert line["workers"] == 1
    assert line["rate"] > 0
    assert line["unit"] == "steps/s"
