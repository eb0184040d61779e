"""A seeded mutator of bytes, for readers that must refuse a damaged file in words of their own."""

from collections.abc import Callable
from random import Random

EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\1\0\0")


def mutated(content: bytes, draw: Random) -> bytes:
    """Return the bytes after one to four changes of a kind each, half of them near the start."""
    for _ in range(draw.randint(1, 4)):
        content = draw.choice(CHANGES)(content, draw)
    return content


def _place(content: bytes, draw: Random) -> int:
    """Draw a place, as often among the first hundred bytes (headers) as anywhere."""
    most = len(content) if draw.random() < 0.5 else min(len(content), 100)
    return draw.randrange(most) if most else 0


def _flipped(content: bytes, draw: Random) -> bytes:
    place = _place(content, draw)
    bit = 1 << draw.randrange(8)
    return (
        content[:place] + bytes(byte ^ bit for byte in content[place:][:1]) + content[place + 1 :]
    )


def _replaced(content: bytes, draw: Random) -> bytes:
    place, length = _place(content, draw), draw.randint(1, 8)
    return content[:place] + draw.randbytes(length) + content[place + length :]


def _extreme(content: bytes, draw: Random) -> bytes:
    place, number = _place(content, draw), draw.choice(EXTREMES)
    return content[:place] + number + content[place + len(number) :]


def _inserted(content: bytes, draw: Random) -> bytes:
    place = _place(content, draw)
    return content[:place] + draw.randbytes(draw.randint(1, 16)) + content[place:]


def _removed(content: bytes, draw: Random) -> bytes:
    place = _place(content, draw)
    return content[:place] + content[place + draw.randint(1, 32) :]


def _repeated(content: bytes, draw: Random) -> bytes:
    place, length = _place(content, draw), draw.randint(1, 64)
    return content[: place + length] + content[place:]


def _cut_short(content: bytes, draw: Random) -> bytes:
    return content[: _place(content, draw)]


CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    _flipped,
    _replaced,
    _extreme,
    _inserted,
    _removed,
    _repeated,
    _cut_short,
)

VALUES = (
    *(
        "0",
        "-1",
        "1",
        "2",
        "1000000000000",
        "9" * 25,
        "1e400",
        "nan",
        "-inf",
        "0.5",
        "-0.0",
        "1e-300",
    ),
    *(
        "true",
        '""',
        '"none"',
        '"auto"',
        '"all"',
        '"../.."',
        '"a:b"',
        '":"',
        r'"\u0000"',
        '"\u2603"',
    ),
    *("[]", "[1]", '["a"]', "[[]]", "[nan]", "{}", '{ name = "dlm" }', '[{ name = "none" }]'),
    *("2026-11-28", "07:32:00", "0x10", "'''\n'''"),
)


def mutated_settings(text: str, draw: Random) -> str:
    """Return a settings file after one to three changes of its lines: keys, values, tables."""
    lines = text.splitlines()
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(lines))
        line, other = lines[place], draw.choice(lines)
        key, equals, _ = line.partition("=")
        lines[place : place + 1] = draw.choice(
            (
                [f"{key}= {draw.choice(VALUES)}" if equals else line],
                [f"{key}= {draw.choice(VALUES)}" if equals else f"name = {draw.choice(VALUES)}"],
                [f"{key}={other.partition('=')[2]}" if equals else other],
                [f"{other.partition('=')[0]}= {draw.choice(VALUES)}"],
                [line, other],
                [line, line],
                [],
            )
        )
        lines = lines or [""]
    return "\n".join(lines)
