"""Refuse a plug-in's setting whose value has the wrong type, before the plug-in is made.

Attacks and defences are plain dataclasses, which take any value and fail where it is first used,
perhaps after an hour of training. The type of the field says what it takes; pydantic checks it.
"""

import json
from contextlib import suppress
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AllowInfNan,
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUserError,
    Strict,
    TypeAdapter,
    ValidationError,
)

_Whole = Annotated[int, Strict()]
_Number = Annotated[float, Strict(), AllowInfNan(False)]
_TYPES: dict[str, Any] = {
    "bool": Annotated[bool, Strict()],
    "float": _Number,
    "Sequence[float]": tuple[_Number, ...],
    "float | None": _Number | None,
    "int": _Whole,
    "int | None": _Whole | None,
    "str": Annotated[str, Strict()],
    "tuple[float, ...]": tuple[_Number, ...],
}
_SCALARS = {bool, float, int, str, NoneType}
_AS_JSON = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def checked_value(owner: str, key: str, value: Any, *, written: object) -> Any:  # noqa: ANN401  JSON's
    """Refuse a value of another type than its field's, NaN and infinity included.

    Args:
        owner: Whose setting it is, such as ``attack dlm``.
        key: The setting.
        value: Its value.
        written: The field's type: as its class writes it, or, of a class that was imported, itself.
            A type that says nothing of what a settings file can hold is left to the class.

    Returns:
        The value; a whole number as a float where the field is one, so that 1 and 1.0 are the same
        setting.

    Raises:
        ValueError: The value does not fit; the message says what would.
    """
    try:
        if not isinstance(written, str):
            _check_as_json(written, value)
            return value
        if written not in _TYPES:
            return value
        fitting = _adapter(written).validate_python(value)
    except ValidationError as error:
        wanted = error.errors()[0]["msg"]
        if error.errors()[0]["type"] == "needs_python_object":
            wanted = f"no settings file can hold a {_text(written)}; give the class a default"
        raise ValueError(f"{owner}: {key}: {wanted} (got {value!r})") from None
    return fitting if isinstance(fitting, float) else value


def _text(kind: object) -> str:
    return getattr(kind, "__name__", str(kind))


def _check_as_json(kind: Any, value: object) -> None:  # noqa: ANN401  any type
    """Check a value against any type: strictly, but for a list, which may stand for a tuple."""
    adapter = _adapter_of(kind)
    if adapter is None:
        return
    try:
        text = json.dumps(value)
    except TypeError:  # an object that Python handed over
        adapter.validate_python(value)
    else:
        adapter.validate_json(text)


def _adapter_of(kind: Any) -> TypeAdapter[Any] | None:  # noqa: ANN401  any type
    """Return what checks values of a type; None of one that says nothing of JSON."""
    try:
        return TypeAdapter(kind, config=_AS_JSON)
    except PydanticSchemaGenerationError:
        return None
    except PydanticUserError:  # a type with a configuration of its own
        with suppress(PydanticUserError):
            return TypeAdapter(kind)
        return None


def schema_of(written: str) -> dict[str, Any]:
    """Return the JSON schema of a field's type as its class writes it; of an unknown one, any."""
    return _adapter(written).json_schema() if written in _TYPES else {}


@cache
def _adapter(written: str) -> TypeAdapter[Any]:
    return TypeAdapter(_TYPES[written])


def is_known(written: str) -> bool:
    """Say whether the text of a field's type is enough to check its values."""
    return written in _TYPES


def is_scalar(written: object) -> bool:
    """Say whether a field's type holds one value, so that a list is several of it."""
    if isinstance(written, str):
        return written in _TYPES and not written.startswith(("Sequence", "tuple"))
    if get_origin(written) in {Union, UnionType}:
        return all(is_scalar(each) for each in get_args(written))
    return written in _SCALARS or get_origin(written) is Literal
