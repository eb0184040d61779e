"""With this folder on PYTHONPATH and PRETENDED_GPUS set, a process pretends once it has torch."""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Finds torch once, and lets the pretended device in behind it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def then(module: ModuleType) -> None:
            execute(module)
            import tests.support.pretended_cuda  # noqa: F401, PLC0415  it needs torch

        spec.loader.exec_module = then  # type: ignore[method-assign]
        return spec


if os.environ.get("PRETENDED_GPUS"):
    sys.meta_path.insert(0, _AfterTorch())
