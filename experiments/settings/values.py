"""Refuse a plug-in's setting whose value has the wrong type, before the plug-in is imported.

Attacks and defences are plain dataclasses, which take any value and fail where it is first used,
perhaps after an hour of training. Their source says which type each field has; pydantic checks it.
"""

from functools import cache
from typing import Annotated, Any

from pydantic import AllowInfNan, Strict, TypeAdapter, ValidationError

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


def checked_value(owner: str, key: str, value: Any, *, written: str) -> Any:  # noqa: ANN401  JSON's
    """Refuse a value of another type than its field's, NaN and infinity included.

    A type that is not among those above is left to the class that wrote it.

    Args:
        owner: Whose setting it is, such as ``attack dlm``.
        key: The setting.
        value: Its value.
        written: The field's type as its class writes it.

    Returns:
        The value; a whole number as a float where the field is one, so that 1 and 1.0 are the same
        setting.

    Raises:
        ValueError: The value does not fit; the message says what would.
    """
    if written not in _TYPES:
        return value
    try:
        fitting = _adapter(written).validate_python(value)
    except ValidationError as error:
        wanted = error.errors()[0]["msg"]
        raise ValueError(f"{owner}: {key}: {wanted} (got {value!r})") from None
    return fitting if isinstance(fitting, float) else value


def schema_of(written: str) -> dict[str, Any]:
    """Return the JSON schema of a field's type as its class writes it; of an unknown one, any."""
    return _adapter(written).json_schema() if written in _TYPES else {}


@cache
def _adapter(written: str) -> TypeAdapter[Any]:
    return TypeAdapter(_TYPES[written])


def is_scalar(written: str) -> bool:
    """Say whether a field's type, as written, holds one value, so that a list is several of it."""
    return written in _TYPES and not written.startswith(("Sequence", "tuple"))
