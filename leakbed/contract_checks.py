"""What an attack and a defence must keep to, found by running them.

The tests of the catalogue, ``leakbed check``, and the harness on what a run's plug-ins return all
ask here; :mod:`leakbed.plugins` has what shows without running anything. Needs torch for what it
is given, but imports it only to try a class out.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from leakbed.contracts import (
    BrokenPluginError,
    EvidenceKind,
    Guess,
    KnowledgeKind,
    Secrets,
    Seen,
    UnfitError,
    View,
)
from leakbed.errors import OURS, of_machine
from leakbed.lookup import format_error

if TYPE_CHECKING:
    from torch import Tensor, device


def blame(plugin: object, what: str, said: str) -> str:
    """Return what an error says of an attack or a defence whose code is at fault.

    Args:
        plugin: The attack or the defence; of a protocol its import path.
        what: ``"attack"``, ``"defence"`` or ``"protocol"``.
        said: What it did.

    Returns:
        One line, with its name and its class.
    """
    if isinstance(plugin, str):
        return f"the code of {what} {plugin} {said}"
    kind = type(plugin)
    name = getattr(plugin, "name", kind.__name__)
    return f"the code of {what} {name} ({kind.__qualname__}) {said}"


@contextmanager
def blamed(plugin: object, what: str, *, within: object = None) -> Iterator[None]:
    """Blame an attack or a defence by name for what its code raises.

    Args:
        plugin: The attack or the defence; of a protocol its import path.
        what: ``"attack"``, ``"defence"`` or ``"protocol"``.
        within: A class or a function of the file whose line is named; None for the plug-in's class.

    Yields:
        Nothing.

    Raises:
        BrokenPluginError: The body raised, with the line of the plug-in's file.
        UnfitError: The body raised it: the attack was not told what it needs, or cannot read it.
        Exception: What the body raised as another error of ours, or what the machine refused.
    """
    try:
        yield
    except (BrokenPluginError, UnfitError):
        raise
    except Exception as error:
        ours = type(error).__module__.partition(".")[0] in OURS
        if ours or of_machine(error) is not None:
            raise
        try:
            file = inspect.getfile(type(plugin) if within is None else within)  # type: ignore[arg-type]
        except (TypeError, OSError):  # of a notebook's cell
            file = None
        said = f"raised {format_error(error, within=file)}"
        raise BrokenPluginError(blame(plugin, what, said)) from error


def guess_breaches(guess: object, view: View) -> list[str]:
    """Return in what an answer is none, as phrases that follow "returned".

    Args:
        guess: What an attack returned.
        view: What it was given.

    Returns:
        One phrase for each breach; empty for none.
    """
    if not isinstance(guess, Guess):
        return [f"{_kind(guess)}; return a leakbed.contracts.Guess"]
    rows = (view.targets, view.rows)
    shapes: Mapping[str, tuple[int, ...]] = {
        "images": (*rows, *view.image_shape),
        "labels": rows,
        "clusters": rows,
        "attributes": rows,
        "scores": rows,
        "objective": rows[:1],
        "failed": rows[:1],
        "stopped_on_budget": rows[:1],
    }
    found = []
    for name, wanted in shapes.items():
        value = getattr(guess, name)
        if value is not None and (said := _tensor_breach(value, wanted)):
            found.append(f"{said} as {name}")
    return found


def sent_breach(sent: object, given: "Tensor") -> str | None:
    """Return in what a defence's answer cannot stand for what it was given, or None if it can.

    Args:
        sent: What it returned.
        given: The tensor it was given.

    Returns:
        A phrase that follows "returned".
    """
    if said := _tensor_breach(sent, tuple(given.shape)):
        return said
    dtype = getattr(sent, "dtype", None)
    if dtype != given.dtype:
        return f"a tensor of {dtype} for one of {given.dtype}"
    if _finite(given) and not _finite(sent):
        return "values that are not finite, for finite ones"
    return None


def values_breach(values: object, count: int) -> str | None:
    """Return in what a metric's answer is not one number per image, or None if it is.

    Args:
        values: What it returned.
        count: How many images it was given.

    Returns:
        A phrase that follows "returned".
    """
    if said := _tensor_breach(values, (count,)):
        return said
    if not _finite(values):
        return "values that are not finite, for images that are"
    return None


def read_evidence(
    kind: EvidenceKind, seen: Seen, device: "device | None"
) -> "Tensor | dict[str, Tensor]":
    """Return what an evidence of one's own makes of the messages that a seat saw.

    Args:
        kind: The evidence.
        seen: The messages.
        device: Where the attack computes.

    Returns:
        A tensor, or several by name, with an entry for each target.

    Raises:
        BrokenPluginError: Its function raised, or returned something else.
    """
    count = len(seen.targets)
    with blamed(kind.name, "evidence", within=kind.tensors):
        made = kind.tensors(seen)
    parts = made if isinstance(made, Mapping) else {"": made}
    for name, value in parts.items():
        if said := _entries_breach(value, count):
            where = f" as {name}" if name else ""
            raise BrokenPluginError(blame(kind.name, "evidence", f"returned {said}{where}"))
    if not parts:
        raise BrokenPluginError(blame(kind.name, "evidence", "returned no tensors"))
    if isinstance(made, Mapping):
        return {name: tensor.to(device) for name, tensor in made.items()}
    return made.to(device)


def tell(kind: KnowledgeKind, secrets: Secrets, settings: Mapping[str, Any]) -> object:
    """Return what an experiment tells an attack by a knowledge of one's own.

    Args:
        kind: The knowledge.
        secrets: What there is to tell.
        settings: Of the kind, all of them.

    Returns:
        Whatever it grants.

    Raises:
        BrokenPluginError: Its function raised, or returned None.
    """
    with blamed(kind.name, "knowledge", within=kind.grant):
        made: object = kind.grant(secrets, **settings)
    if made is None:
        said = "returned None; return what the attack is told"
        raise BrokenPluginError(blame(kind.name, "knowledge", said))
    return made


def refuse_unsent(
    defense: object, sent: Mapping[str, "Tensor"], given: Mapping[str, "Tensor"]
) -> None:
    """Refuse what a defence returns where it cannot stand for what it was given.

    Args:
        defense: Whose answer it is.
        sent: What it returned, by name.
        given: What it was given, by the same names.

    Raises:
        BrokenPluginError: A name, a shape or a type is another, or values are no longer finite.
    """
    if not isinstance(sent, Mapping) or sent.keys() != given.keys():
        names = sorted(sent) if isinstance(sent, Mapping) else _kind(sent)
        said = f"returned {names} where {sorted(given)} belong"
        raise BrokenPluginError(blame(defense, "defence", said))
    for name, value in given.items():
        if (breach := sent_breach(sent[name], value)) is not None:
            said = f"returned {breach} as {name}"
            raise BrokenPluginError(blame(defense, "defence", said))


def refuse_state(defense: object, state: object) -> None:
    """Refuse a defence's next state where it could not be kept for the next message.

    A state travels between processes as tensors and numbers, so a lock, a file or a function in it
    would be lost, or fail in the node.

    Args:
        defense: Whose it is.
        state: What it returned.

    Raises:
        BrokenPluginError: It is no state, or holds what is neither.
    """
    from torch import Tensor  # noqa: PLC0415  as the module's first lines say

    from leakbed.contracts.defense import DefenseState  # noqa: PLC0415  which imports this module

    if not isinstance(state, DefenseState):
        said = f"returned {_kind(state)} where its next DefenseState belongs"
        raise BrokenPluginError(blame(defense, "defence", said))
    wrong = [
        f"{type(value).__name__} {name!r} in its state, where a whole number belongs"
        for name in ("stream", "messages")
        if not isinstance(value := getattr(state, name), int)
    ]
    wrong += [
        f"{type(value).__name__} {name!r} in its state, where tensors belong"
        for tensors in (state.tensors, state.trained, state.momenta)
        for name, value in tensors.items()
        if not isinstance(value, Tensor)
    ]
    if wrong:
        said = f"keeps {wrong[0]}: it goes from process to process; make anything else from those"
        raise BrokenPluginError(blame(defense, "defence", said))


def refuse_loss(defense: object, loss: object, output: "Tensor") -> None:
    """Refuse what a defence adds to a node's loss where it is no number to minimise.

    Args:
        defense: Whose it is.
        loss: What it returned; None adds nothing.
        output: What the node's part made of the batch.

    Raises:
        BrokenPluginError: It is no tensor of one number, depends on nothing that is trained, or is
            not finite for a finite output.
    """
    if loss is None:
        return
    said = _tensor_breach(loss, ())
    if said is None and not getattr(loss, "requires_grad", False):
        said = "a number that depends on nothing that is trained"
    if said is None and _finite(output) and not _finite(loss):
        said = "a value that is not finite"
    if said is not None:
        raise BrokenPluginError(blame(defense, "defence", f"returned {said} as loss"))


def _finite(tensor: Any) -> bool:  # noqa: ANN401  a tensor, by what was asked before
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _tensor_breach(value: object, wanted: tuple[int, ...]) -> str | None:
    from torch import Tensor  # noqa: PLC0415  as the module's first lines say

    if not isinstance(value, Tensor):
        return f"{_kind(value)} where a torch tensor of shape {wanted} belongs"
    if tuple(value.shape) != wanted:
        return f"a tensor of shape {tuple(value.shape)} where {wanted} belongs"
    return None


def _entries_breach(value: object, count: int) -> str | None:
    """Return in what a value is no tensor of one entry for each target."""
    from torch import Tensor  # noqa: PLC0415  as the module's first lines say

    if not isinstance(value, Tensor):
        return f"{_kind(value)} where a torch tensor of {count} entries, one a target, belongs"
    if value.ndim < 1 or len(value) != count:
        return f"a tensor of shape {tuple(value.shape)} for {count} targets, its leading axis"
    return None


def _kind(value: object) -> str:
    if value is None:
        return "None"
    kind = type(value)
    return f"a {kind.__module__}.{kind.__qualname__}"
