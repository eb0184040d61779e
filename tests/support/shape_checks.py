"""Types are checked in every call of a test; array shapes where a signature names some.

The pytest plug-in of jaxtyping binds and checks the arguments of every function twice, for its
shapes. Most functions name none: they get the type checker alone, which takes a fifth off the time
of tests that train.
"""

from collections.abc import Callable
from dataclasses import is_dataclass
from inspect import isclass
from typing import Any

import jaxtyping

_shape_checked = jaxtyping.jaxtyped


def checked(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decorate as ``jaxtyping.jaxtyped`` does, at the price of what a signature asks for."""

    def decorated(function: Any) -> Any:
        if isclass(function):
            if is_dataclass(function) and "__init__" in vars(function):
                function.__init__ = decorated(function.__init__)
            return function
        if _may_name_shapes(function):
            return _shape_checked(function, typechecker=typechecker)
        return typechecker(function)

    return decorated


def _may_name_shapes(function: Any) -> bool:
    """Whether an annotation names a shape, or is or holds text, which may."""
    named = ("jaxtyping.", "ForwardRef")
    annotations = function.__annotations__.values()
    return any(isinstance(a, str) or any(name in repr(a) for name in named) for a in annotations)


jaxtyping.jaxtyped = checked
