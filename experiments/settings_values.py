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
    "float | None": _Number | None,
    "int": _Whole,
    "int | None": _Whole | None,
    "str": Annotated[str, Strict()],
    "tuple[float, ...]": tuple[_Number, ...],
}


def check_value(owner: str, key: str, value: object, *, written: str) -> None:
    """Refuse a value of another type than its field's, NaN and infinity included.

    A type that is not among those above is left to the class that wrote it.

    Args:
        owner: Whose setting it is, such as ``attack dlm``.
        key: The setting.
        value: Its value.
        written: The field's type as its class writes it.

    Raises:
        ValueError: The value does not fit; the message says what would.
    """
    if written not in _TYPES:
        return
    try:
        _adapter(written).validate_python(value)
    except ValidationError as error:
        wanted = error.errors()[0]["msg"]
        raise ValueError(f"{owner}: {key}: {wanted} (got {value!r})") from None


@cache
def _adapter(written: str) -> TypeAdapter[Any]:
    return TypeAdapter(_TYPES[written])
