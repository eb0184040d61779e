"""Who attacks, what it reads and what it knows: the words of a threat model.

:class:`Evidence` and :class:`Knowledge` are what the contracts have words for. A plug-in adds its
own: an :class:`EvidenceKind` is a function from the messages that a seat sees to tensors, a
:class:`KnowledgeKind` a function from what the experiment may tell of the victim to whatever an
attack is given. The harness decides which messages a seat sees (:func:`sees`), and an experiment
what is told. Importing this needs neither torch nor Flower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from leakbed.events import EVENT_TYPES
from leakbed.lookup import unknown_name

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from leakbed.events import Event, Target
    from leakbed.models import Architecture


class Seat(StrEnum):
    """The party the adversary is."""

    SERVER = "server"
    FED_SERVER = "fed-server"
    CLIENT = "client"
    LABEL_PARTY = "label-party"
    EAVESDROPPER = "eavesdropper"


class Evidence(StrEnum):
    """A kind of protocol message (or none) that an attack reads."""

    NOTHING = "nothing"
    UPDATE = "update"
    SMASHED = "smashed"
    ROUND_SMASHED = "round-smashed"
    CUT_GRADIENT = "cut-gradient"
    HEAD_WEIGHT_GRADIENT = "head-weight-gradient"
    SERVED = "served"


class Knowledge(StrEnum):
    """What an attack needs beyond the protocol's own messages."""

    ARCHITECTURE = "architecture"
    BATCH_PLAN = "batch-plan"
    PUBLIC_IMAGES = "public-images"
    PUBLIC_LABELS = "public-labels"
    PUBLIC_ATTRIBUTES = "public-attributes"
    LABELS = "labels"
    KNOWN_LABELS = "known-labels"
    OWN_IMAGES = "own-images"
    NATURAL_IMAGES = "natural-images"
    SERVER_PART = "server-part"


IN_WORDS: dict[Evidence | Knowledge, str] = {
    Evidence.NOTHING: "no message at all",
    Evidence.UPDATE: "the weights before and after a node's local training",
    Evidence.SMASHED: "the activations a node sends at the cut",
    Evidence.ROUND_SMASHED: "all activations that nodes send at the cut in a round of training",
    Evidence.CUT_GRADIENT: "the gradient returned at the cut",
    Evidence.HEAD_WEIGHT_GRADIENT: "the weight gradient of the node's own last layer",
    Evidence.SERVED: "what the server sends the node that it is",
    Knowledge.ARCHITECTURE: "the layers of the part it does not hold (not their weights)",
    Knowledge.BATCH_PLAN: "how many samples and local steps lie behind a message",
    Knowledge.PUBLIC_IMAGES: "images of its own",
    Knowledge.PUBLIC_LABELS: "the label of each image of its own",
    Knowledge.PUBLIC_ATTRIBUTES: "that attribute of each image of its own",
    Knowledge.LABELS: "the true labels of the attacked samples",
    Knowledge.KNOWN_LABELS: "the true labels of a few of the attacked samples",
    Knowledge.OWN_IMAGES: "the inputs behind its own messages",
    Knowledge.NATURAL_IMAGES: "natural images of the task, without labels, which it alters",
    Knowledge.SERVER_PART: "the weights of its own part of the network",
}


_OF_WEIGHTS = frozenset({"weights-down", "update-up"})
_SEES: Mapping[Seat, frozenset[str] | None] = {
    Seat.SERVER: _OF_WEIGHTS
    | {
        "smashed-up",
        "cut-gradient-down",
        "features-down",
        "upper-gradient-up",
        "gradients",
        "sealed",
        "extras",
        "foreign",
        "failed",
    },
    # Where whole weights travel it is the server; else it reads what is relayed, and nothing else.
    Seat.FED_SERVER: _OF_WEIGHTS | {"bottom", "bottom-gradient-up", "sealed"},
    Seat.CLIENT: None,
    Seat.LABEL_PARTY: frozenset(),
    Seat.EAVESDROPPER: None,
}
"""Kinds of messages that a seat sees, keys of ``leakbed.events.EVENT_TYPES``; None for all."""


def sees(seat: Seat, kind: str) -> bool:
    """Say whether a seat sees messages of a kind; a client those of its own node alone.

    Args:
        seat: The party.
        kind: A key of :data:`leakbed.events.EVENT_TYPES`, or ``"foreign"``.

    Returns:
        Whether it may read them.
    """
    seen = _SEES[seat]
    return seen is None or kind in seen


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What a seat saw of a run, as far as an evidence asks for it.

    Attributes:
        seat: The party.
        events: Messages of the kinds and rounds that the evidence names, in the order they were
            sent, with numpy arrays of their own; of a client its own node's alone.
        targets: The attacked messages, in the order of the view.
        about: What the trace says of its run, as :func:`leakbed.tap.facts.about` has it.
    """

    seat: Seat
    events: tuple[Event, ...]
    targets: tuple[Target, ...]
    about: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class EvidenceKind:
    """Evidence that the contracts have no word for.

    Attributes:
        name: Of the view's ``granted``, of cards and reports; none of :class:`Evidence`.
        in_words: What is read, as it ends the phrase "reads ...".
        reads: Kinds of messages it is made of, keys of :data:`leakbed.events.EVENT_TYPES` or
            ``"foreign"``; the seat must see each of them.
        tensors: Returns what the attack gets: a tensor, or several by name, whose leading axis is
            the target. Called with equal messages it returns equal tensors, and draws nothing.
        per: What is attacked where smashed data travel: ``"row"`` is one smashed row, ``"node"``
            all that a node trained on in the round. Where weights travel it is a node's update.
        rounds: Of which rounds messages are read: the ``"attacked"`` one, or every round
            ``"until"`` then, the attacked one among them.
    """

    name: str
    in_words: str
    reads: frozenset[str]
    tensors: Callable[[Seen], Tensor | Mapping[str, Tensor]]
    per: Literal["row", "node"] = "row"
    rounds: Literal["attacked", "until"] = "attacked"

    def __post_init__(self) -> None:
        """Refuse a name that is another's, and evidence of nothing or of messages there are not.

        Raises:
            ValueError: If so.
        """
        _refuse_name(self.name, [*Evidence], "evidence")
        if not self.reads:
            raise ValueError(
                f"evidence {self.name!r} reads no messages; name their kinds, such as "
                'reads=frozenset({"smashed-up"})'
            )
        legal = {*EVENT_TYPES, "foreign"}
        if strange := sorted(each for each in self.reads if each not in legal):
            said = unknown_name("kind of message", str(strange[0]), legal)
            raise ValueError(f"evidence {self.name!r}: {said}")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True, eq=False)
class Secrets:
    """What an experiment may tell an adversary of a run; no attack sees more of it than it is told.

    Attributes:
        targets: The attacked messages.
        behind: Which rows of ``images``, or of ``test_images`` where test rows are attacked, stand
            behind each target.
        images: All private images of the training, pixel values in [0, 1].
        labels: Theirs.
        test_images: The held-out ones.
        test_labels: Theirs.
        public_images: What adversaries of the run own anyway.
        public_labels: Their labels.
        architecture: The network.
        about: What the trace says of its run.
        bottom: Returns the node's part as the last round left it, frozen and in evaluation mode;
            raises where the run has no one bottom or an earlier round is attacked.
        sends: Returns what a node sends of images after training, given them and a stream: that
            part's output behind the node's defences of smashed data, which draw from the stream.
        stream: Seeds whatever is drawn; nobody else's.
        device: Where the attack computes.
    """

    targets: Sequence[Target]
    behind: Int[Tensor, " targets rows"]
    images: Float[Tensor, " private channels height width"]
    labels: Int[Tensor, " private"]
    test_images: Float[Tensor, " test channels height width"]
    test_labels: Int[Tensor, " test"]
    public_images: Float[Tensor, " public channels height width"]
    public_labels: Int[Tensor, " public"]
    architecture: Architecture
    about: Mapping[str, Any]
    bottom: Callable[[], nn.Module]
    sends: Callable[[Float[Tensor, " batch *image"], int], Float[Tensor, " batch *cut"]]
    stream: int
    device: torch.device


@dataclass(frozen=True, kw_only=True, eq=False)
class KnowledgeKind:
    """Knowledge that the contracts have no word for; an attack has it where the experiment says so.

    Attributes:
        name: Of the view's ``granted``, of the experiment's ``grants``, of cards and reports; none
            of :class:`Knowledge`.
        in_words: What is known, as it ends the phrase "knows ...".
        grant: Returns what the attack gets, of the :class:`Secrets` and the settings by keyword;
            the same of the same, and never None.
        settings: Its settings with their defaults, which ``grants`` may change.
    """

    name: str
    in_words: str
    grant: Callable[..., Any]
    settings: Mapping[str, int | float | str | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a name that is another's with a ``ValueError``."""
        _refuse_name(self.name, [*Knowledge], "knowledge")

    def __str__(self) -> str:
        return self.name


def _refuse_name(name: str, taken: Sequence[str], what: str) -> None:
    if not name or name != name.strip().lower() or "/" in name:
        raise ValueError(f"{what} is called {name!r}; use lower case without slashes")
    if name in taken:
        raise ValueError(f"{name!r} is {what} of the contracts already; call it otherwise")


class UnfitError(ValueError):
    """An attack and what it is to attack do not go together; says why, and what would."""


class MissingKnowledgeError(UnfitError):
    """A view lacks something the attack's threat model says it needs."""


class Granted(dict[str, Any]):
    """What a view grants of an attack's own kinds, by their names; another name is an error."""

    def __missing__(self, name: str) -> Any:  # noqa: ANN401  it never returns
        """Refuse what the threat model does not declare."""
        raise MissingKnowledgeError(
            f"the view does not grant {name!r}: the threat model declares "
            f"{', '.join(sorted(self)) or 'no evidence or knowledge of its own'}, and an attack "
            "reads what it declares alone; name it under `evidence` or `needs` of the threat model"
        )


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """Who attacks, what it reads and what it must know beforehand.

    Attributes:
        seat: The party the adversary is.
        evidence: The messages it reads.
        needs: Knowledge beyond the protocol's own messages.
        active: Whether it changes messages rather than only reading them.
        infers: The attribute it infers, one of :data:`leakbed.contracts.attributes.ATTRIBUTES`;
            None where it infers none.
    """

    seat: Seat
    evidence: frozenset[Evidence | EvidenceKind]
    needs: frozenset[Knowledge | KnowledgeKind] = frozenset()
    active: bool = False
    infers: str | None = None

    def __post_init__(self) -> None:
        """Refuse two kinds of one name: a view would hold one of them alone.

        Raises:
            ValueError: If so.
        """
        if twice := {name for name in self.kinds if self.kinds.count(name) > 1}:
            raise ValueError(f"two kinds are called {min(twice)!r}; give each a name of its own")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of all evidence and knowledge beyond the contracts' own words."""
        return (
            *(each.name for each in self.evidence_kinds),
            *(each.name for each in self.knowledge_kinds),
        )

    @property
    def evidence_kinds(self) -> tuple[EvidenceKind, ...]:
        """Evidence beyond the contracts' own words, by name."""
        return tuple(e for e in sorted(self.evidence, key=str) if isinstance(e, EvidenceKind))

    @property
    def knowledge_kinds(self) -> tuple[KnowledgeKind, ...]:
        """Knowledge beyond the contracts' own words, by name."""
        return tuple(e for e in sorted(self.needs, key=str) if isinstance(e, KnowledgeKind))

    def in_words(self) -> str:
        """Say the threat model as one English sentence, for reports."""
        manner = "rewrites messages" if self.active else "follows the protocol"
        reads = ", ".join(map(_words, sorted(self.evidence, key=str)))
        knows = ", ".join(map(_words, sorted(self.needs, key=str))) or "nothing else"
        infers = f", infers the attribute {self.infers!r}" if self.infers else ""
        return f"The {self.seat} {manner}, reads {reads}{infers}, and knows {knows}."


def _words(item: Evidence | Knowledge | EvidenceKind | KnowledgeKind) -> str:
    return item.in_words if isinstance(item, EvidenceKind | KnowledgeKind) else IN_WORDS[item]
