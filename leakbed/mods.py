"""Defences as Flower mods: one mod carries any defence, in our client and in a stranger's.

Plug it into an app that exists already::

    app = ClientApp(mods=[defend(WeightNoise(scale=0.01), stream=secrets.randbits(63))])
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod

from leakbed.contracts import Defense, DefenseState, IllegalCombinationError, Protects
from leakbed.flower_internals import with_content
from leakbed.wire.messages import WEIGHTS
from leakbed.wire.records import SMASHED, copy_records, pack, sole_arrays, unpack, where
from leakbed.wire.translation import SPLIT

if TYPE_CHECKING:
    from torch import Tensor

Chosen = tuple[Sequence[Defense], int]
_STATE = "leakbed.defence"


def defend(defence: Defense | Callable[[Context], Chosen], *, stream: int | None = None) -> Mod:
    """Return a mod that protects what a node sends.

    Args:
        defence: One defence, or a function that looks up a node's defences and their stream at
            call time (Flower binds mods when a handler is registered).
        stream: Seed of the defence's noise; keep it secret. Needed with a single defence.

    Returns:
        A mod for ``ClientApp(mods=[...])``.

    Raises:
        ValueError: If a single defence comes without its stream.
        IllegalCombinationError: If a mod never sees what a single defence protects.
    """
    if isinstance(defence, Defense):
        _refuse_unseen(defence)
        if stream is None:
            raise ValueError("defend(defence) needs stream=..., the secret seed of its noise")
        chosen: Chosen = ((defence,), stream)
        return _mod(lambda _: chosen)
    return _mod(defence)


def _mod(lookup: Callable[[Context], Chosen]) -> Mod:
    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        reply = call_next(message, context)
        kind = _kind(message, reply)
        if kind is None:
            return reply
        defences, stream = lookup(context)
        for index, defence in enumerate(defences):
            _refuse_misfit(defence, kind)
            if kind in defence.protects:
                key = f"{_STATE}.{index}"
                state = load_state(context, key) or defence.begin(stream + index)
                state, reply = _protected(defence, state, message, reply)
                save_state(context, key, state)
        return reply

    return mod


def _refuse_unseen(defence: Defense) -> None:
    """Refuse a defence that would let every message of a node pass unprotected."""
    if defence.protects == {Protects.CUT_GRADIENT}:
        raise IllegalCombinationError(
            f"{defence.name} protects the cut gradient, which the label holder sends, and a node's "
            "mod never sees; give it to the server's part, TopTrainer(..., defences=(...)), or, "
            "where labels stay at the node, to an app built on Leakbed's split clients"
        )


def _kind(message: Message, reply: Message) -> Protects | None:
    """Return what kind of tensor a reply carries, if any of ours."""
    kind = message.metadata.message_type
    if reply.has_error():
        return None
    if kind in SPLIT:
        return Protects.SMASHED if SMASHED in reply.content else None
    if kind.split(".")[0] != WEIGHTS or not reply.content.array_records:
        return None
    return Protects.UPDATE


def _refuse_misfit(defence: Defense, kind: Protects) -> None:
    if kind in defence.protects:
        return
    if kind is Protects.SMASHED and Protects.CUT_GRADIENT in defence.protects:
        return  # a cut gradient is protected by the party that sends it, not here
    if defence.protects & {Protects.LABELS, Protects.TOP}:
        raise IllegalCombinationError(
            f"{defence.name} changes what a party trains with, its labels or the top's steps, "
            "which a mod never sees; use it in an app built on Leakbed's strategies and clients"
        )
    if Protects.TRAINING in defence.protects:
        raise IllegalCombinationError(
            f"{defence.name} hooks into the node's own training step, which a mod never sees; use "
            "it in an app built on Leakbed's split clients, which call it themselves"
        )
    protects = ", ".join(sorted(defence.protects))
    raise IllegalCombinationError(
        f"{defence.name} protects {protects} messages but this app sends {kind}; "
        f"use a defence that protects {kind}"
    )


def _protected(
    defence: Defense, state: DefenseState, message: Message, reply: Message
) -> tuple[DefenseState, Message]:
    records = copy_records(reply.content)
    if SMASHED in records:
        batch = unpack(records.array_records[SMASHED])
        state, smashed = defence.protect_smashed(state, _tensors({"s": batch["smashed"]})["s"])
        records[SMASHED] = pack({**batch, "smashed": smashed.numpy()})
    else:
        key, before, after = _update(message, reply)
        state, sent = defence.protect_update(state, before, after)
        records[key] = pack({name: value.numpy() for name, value in sent.items()})
    return state.next(), with_content(reply, records)


def _update(
    message: Message, reply: Message
) -> tuple[str, "dict[str, Tensor]", "dict[str, Tensor]"]:
    """Return the reply's record of weights, by key, and the weights before and after."""
    received, key = sole_arrays(message), sole_arrays(reply)
    if received is None or key is None:
        raise IllegalCombinationError(
            f"a defence of updates reads one ArrayRecord each way, but {where(message)} brought "
            f"{where(reply)}; send the weights in one ArrayRecord, or defend them in the client"
        )
    before = unpack(message.content.array_records[received])
    after = unpack(reply.content.array_records[key])
    if {n: a.shape for n, a in before.items()} != {n: a.shape for n, a in after.items()}:
        raise IllegalCombinationError(
            f"a defence of updates needs the same arrays each way, but {where(message)} brought "
            f"{sorted(before)} and took {sorted(after)}; send all weights back under their names"
        )
    return key, _tensors(before), _tensors(after)


def _tensors(arrays: Mapping[str, object]) -> "dict[str, Tensor]":
    import torch  # noqa: PLC0415  a stranger's app may tap its grid without torch

    return {name: torch.as_tensor(value) for name, value in arrays.items()}


def load_state(context: Context, key: str) -> DefenseState | None:
    """Return a defence's state as :func:`save_state` wrote it; None where it never did."""
    record = context.state.config_records.get(key)
    if record is None:
        return None
    kept = context.state.array_records.get(f"{key}.tensors")
    return DefenseState(
        stream=int(str(record["stream"])),
        messages=int(str(record["messages"])),
        tensors=_tensors(unpack(kept)) if kept is not None else {},
        alarm=int(str(record["alarm"])),
        score=float(str(record["score"])),
        last=float(str(record["last"])),
        probing=bool(record["probing"]),
    )


def save_state(context: Context, key: str, state: DefenseState) -> None:
    """Write a defence's state into a node's, for whichever process serves the next message.

    Args:
        context: The node's.
        key: Of the defence.
        state: Its state.
    """
    numbers = ("stream", "messages", "alarm", "score", "last", "probing")
    context.state[key] = ConfigRecord({name: getattr(state, name) for name in numbers})
    if state.tensors:
        tensors = {name: value.numpy() for name, value in state.tensors.items()}
        context.state[f"{key}.tensors"] = pack(tensors)
