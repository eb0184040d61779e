"""Cards: one machine-readable file per result, so that a run can resume and be reported later.

A card's key is a hash of its cell's settings and of the code that it depends on; it is written
whole or not at all. A number never stands alone: scores without baselines are refused, and a value
that is not finite becomes ``null`` with its place named in ``unreliable``. Importing this needs no
torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from leakbed.contracts import ThreatModel
from leakbed.errors import naming_folder

SCHEMA_VERSION = 2
_OLDER = {1: ", whose SSIM is another (of the whole padded map)"}
BUDGET_BOUND = 0.1
"""A card is budget-bound if more than this share of its targets stopped on the attack's budget."""
ABOVE = 1e-3
"""A card is above its ceiling if its hits, or more, are less likely than this under the ceiling."""
PACKAGES = ("attacks", "clients", "defenses", "experiments", "leakbed", "strategies")
"""The packages whose sources a result depends on."""

JsonObject = dict[str, JsonValue]


class CardError(ValueError):
    """A card that cannot be read or written; the message names the file."""


class Threat(BaseModel):
    """A threat model as a card states it.

    Attributes:
        seat: The party the adversary is.
        active: Whether it changes messages rather than only reading them.
        needs: Knowledge beyond the protocol's own messages.
        evidence: The messages it reads.
        in_words: All of it as one English sentence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seat: str
    active: bool
    needs: tuple[str, ...]
    evidence: tuple[str, ...]
    in_words: str

    @classmethod
    def of(cls, threat: ThreatModel) -> Threat:
        """Return an attack's declared threat model in a card's form."""
        return cls(
            seat=str(threat.seat),
            active=threat.active,
            needs=tuple(sorted(map(str, threat.needs))),
            evidence=tuple(sorted(map(str, threat.evidence))),
            in_words=threat.in_words(),
        )


class Exposure(BaseModel):
    """When and from how many rows the attacked messages were made: it decides what they give away.

    Attributes:
        round: The attacked round.
        trained: Whether the network had been trained at all when a message's work began: of all the
            messages (``yes``), of none (``no``), or of some (``partly``).
        mode: Of the node's network as it made them: ``train`` (BatchNorm takes the batch's own
            statistics, dropout drops) or ``eval``; ``None`` for a foreign app, which does not say.
        rows: Private samples behind a message: of an update all it was trained on, of smashed data
            the batch; the most, where they differ, and ``None`` where nobody says.
        steps: Optimiser steps behind an update; ``None`` for smashed data, or where nobody says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int
    trained: Literal["yes", "no", "partly"]
    mode: Literal["train", "eval"] | None
    rows: int | None
    steps: int | None = None

    def in_words(self) -> str:
        """Return it as a phrase for reports."""
        before = {"yes": "trained before", "no": "not trained before", "partly": "partly untrained"}
        rows = "" if self.rows is None else _counted(self.rows, "row")
        steps = "" if self.steps is None else _counted(self.steps, "step")
        behind = " and ".join(part for part in (rows, steps) if part)
        parts = [
            f"round {self.round}, {before[self.trained]}",
            f"{self.mode} mode" if self.mode else "",
            f"{behind} behind a message" if behind else "",
        ]
        return ", ".join(part for part in parts if part)


class Bound(BaseModel):
    """The ceiling beside a card: how often any attack from its seat identifies a row, at most.

    Either ``why`` says that there is none, or all of the numbers are there.

    Attributes:
        why: What is missing for a number.
        game: What is named: a ``"row"``, or a ``"canary label"``, which was drawn whatever the
            image; then ``candidates`` are classes, and ``hits`` are of canaries alone.
        ceiling: Mean over messages.
        error: Its standard error.
        messages: Of how many messages.
        guesses: Length of the list that a guess may give: the rows behind a message.
        candidates: Among how many rows it names them.
        chance: Of a list drawn at random.
        cap: What the defence's claim allows; ``None`` without a claim of these messages.
        norm: Mean L2 norm of smashed rows without noise, with which a level of noise must be
            compared; ``None`` of updates.
        seat: Who reads the messages.
        round: Of the messages.
        used_before: Of how many messages a row was trained on earlier: of those the ceiling is
            given weights that the row already moved.
        told: What the informed guesser is told beside the protocol.
        hits: How many of the card's targets were identified; of a message of several rows, which
            counts by its share of them, the sum is rounded down.
        targets: Of how many.
        p: How likely so many hits are where every guess is right as often as the ceiling, with
            three standard errors more, allows.
        doubts: What the check of the recorded noise found to be other than the defence says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    why: str | None = None
    game: Literal["row", "canary label"] = "row"
    ceiling: float | None = None
    error: float | None = None
    messages: int | None = None
    guesses: int | None = None
    candidates: int | None = None
    chance: float | None = None
    cap: float | None = None
    norm: float | None = None
    seat: str | None = None
    round: int | None = None
    used_before: int | None = None
    told: str | None = None
    hits: int | None = None
    targets: int | None = None
    p: float | None = None
    doubts: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _says_why_or_how_much(self) -> Bound:
        """Refuse both or neither of a number and the reason for none."""
        if (self.why is None) == (self.ceiling is None):
            raise ValueError("a ceiling is a number, or `why` there is none")
        return self


class Card(BaseModel):
    """One result: what was run, what it leaked, what to compare it with, what it cost.

    Attributes:
        schema_version: Of the card format.
        key: Hash of the cell's settings and the source; also the file's name.
        status: ``done``; ``unfit``: the parts do not fit; ``diverged``: training left the finite
            numbers, so that there is nothing to attack; ``failed``: the code of the attack or of a
            defence broke, and the cell is tried again next time; ``unscored``: attacked without an
            answer key.
        why: Why the cell did not run, where its training diverged, or what the code raised.
        demo: Whether the budget was cut for a demonstration.
        case: The experiment's name of this setting.
        protocol: Catalogue key of the protocol.
        data: Name of the data set.
        model: Name of the network.
        cut: The last layer of the bottom, by its index or path; ``None`` for uncut protocols.
        nodes: Number of data holders.
        attack: Catalogue key of the attack.
        defense: Catalogue key of the defence, or ``none``; stacked ones joined by ``+``.
        seed: The cell's seed, of the whole run; of a trace whose run's seed is not known, that of
            the attack.
        attack_seed: What the attack on a recorded trace was drawn from; ``None`` in a run, whose
            attacks are drawn from its seed.
        threat: Who attacks and what it may read; ``None`` if the attack could not be set up.
        exposure: When and from how many rows the attacked messages were made; ``None`` where no
            recorded message was attacked.
        tuned_on: What the attack's settings were chosen on: ``default`` (the catalogue's, but for
            those that ``settings`` lists), ``published`` (as its source has them), or the ``seeds``
            and ``rows`` of the runs that decided.
        settings: Everything else the cell was run with; ``device`` is the type that computed.
        device: Where the server and the attack computed: its ``type`` (``cpu`` or ``cuda``),
            ``name`` and, of a GPU, ``driver``; and the names of what the ``nodes`` computed on.
            Empty on an earlier version's card, and where nothing was computed.
        scores: From the oracle, ``Scores.as_dict``.
        baselines: The same metrics without evidence: baseline, metric, mean.
        control: The negative control's verdict; ``None`` where there is none. Of an active
            adversary also what it reads of a client that was ``never_hijacked``, and what that
            client's detectors found (``detection``).
        utility: What the defence left of the task: test accuracy and the like; empty where a node
            stopped.
        detection: What detectors at the nodes found, and whether the run was hijacked; empty
            without detectors.
        smashed: Of the last round's smashed data, whoever reads them: their distance correlation
            with the images, ``corrected`` for bias (0 for independent data) and ``plain``.
        cost: Seconds, bytes up and down (evaluation included), peak memory of the process so far in
            bytes, and, on a GPU, that of its tensors there (``peak_gpu_memory``).
        reported: The source's own figure, where there is one.
        unreliable: Why the numbers should not be trusted, or ``None``.
        objective: What the attack minimised, as means over targets: of its guess (``attack``), of
            what it would be for ``noise``, a ``grey`` image and, where there are any, the mean
            ``public image``, under the guessed labels; and how many targets are ``solved`` by the
            attack's own measure. Empty where an attack minimises nothing that can be compared.
        notes: What a reader of the numbers should know, one line each: fewer targets than asked
            for, images too small for SSIM, a network that ends in a Softmax.
        stopped_on_budget: Share of the targets at which the attack ran out of its budget of steps
            rather than out of progress; ``None`` where it has no such budget.
        ceiling: What no attack from the seat exceeds, where the experiment asks for it.
        noise: What the check of the run's recorded noise found to be other than the defence says.
        version: Of Leakbed.
        source: Hash of the code that the result depends on, as far as it computes.
        guess: Under which name the guess and its truth are kept in ``guesses/`` and ``truths/``;
            ``None`` where nothing was guessed, or on an earlier version's card, whose key it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[2] = 2
    key: str = Field(pattern=r"^[0-9a-f]{16}$")
    status: Literal["done", "unfit", "diverged", "failed", "unscored"] = "done"
    why: str | None = None
    demo: bool = False
    case: str
    protocol: str
    data: str
    model: str
    cut: int | str | None = None
    nodes: int
    attack: str
    defense: str = "none"
    seed: int
    attack_seed: int | None = None
    threat: Threat | None = None
    exposure: Exposure | None = None
    tuned_on: JsonValue = "default"
    settings: JsonObject = Field(default_factory=dict)
    device: dict[str, str] = Field(default_factory=dict)
    scores: JsonObject = Field(default_factory=dict)
    baselines: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    control: JsonObject | None = None
    utility: JsonObject = Field(default_factory=dict)
    detection: JsonObject = Field(default_factory=dict)
    smashed: JsonObject = Field(default_factory=dict)
    cost: JsonObject = Field(default_factory=dict)
    reported: JsonValue = None
    unreliable: str | None = None
    objective: dict[str, float | None] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stopped_on_budget: float | None = Field(default=None, ge=0, le=1)
    ceiling: Bound | None = None
    noise: tuple[str, ...] = ()
    version: str
    source: str
    guess: str | None = Field(default=None, pattern=r"^[0-9a-f]{16}$")

    @property
    def guess_key(self) -> str:
        """The name under which its guess and truth are kept."""
        return self.guess or self.key

    @property
    def budget_bound(self) -> str | None:
        """The mark of a card whose scores a larger budget of the attack may change, or ``None``."""
        share = self.stopped_on_budget
        if share is None or share <= BUDGET_BOUND:
            return None
        return f"budget-bound: {share:.0%} of the targets stopped on the attack's budget of steps"

    @property
    def noise_doubts(self) -> tuple[str, ...]:
        """What is known of recorded noise that is not what the defence says.

        The run's own check and that of its ceiling look at messages that may be the same: what the
        first says of a check, the second need not repeat.
        """
        checks = {each.partition(":")[0] for each in self.noise}
        of_ceiling = self.ceiling.doubts if self.ceiling else ()
        return (*self.noise, *(e for e in of_ceiling if e.partition(":")[0] not in checks))

    @property
    def above_ceiling(self) -> str | None:
        """The mark of a card that identifies more than its seat allows but by chance."""
        bound = self.ceiling
        if bound is None or bound.p is None or bound.p >= ABOVE:
            return None
        return (
            f"above its ceiling: {bound.hits} of {bound.targets} "
            f"{'identified' if bound.game == 'row' else 'canary labels named'}, where the best "
            f"possible guess is right {bound.ceiling:.3f} of the time; the attack read what its "
            "seat does not have or several messages of a row, or the ceiling leaves out part of one"
        )

    @model_validator(mode="before")
    @classmethod
    def _keep_finite(cls, given: object) -> object:
        """Turn every NaN and infinity into ``None`` and say so in ``unreliable``."""
        if not isinstance(given, Mapping):
            return given
        places: list[str] = []
        kept = {name: _finite(value, name, places) for name, value in given.items()}
        if places:
            reason = f"not finite: {', '.join(places)}"
            given_reason = kept.get("unreliable")
            kept["unreliable"] = f"{given_reason}; {reason}" if given_reason else reason
        return kept

    @model_validator(mode="after")
    def _stands_on_its_own(self) -> Card:
        """Refuse a number without its baselines, and a refusal without its reason."""
        if self.status in {"unfit", "diverged", "failed"} and not self.why:
            raise ValueError(f"a card of status {self.status!r} needs `why`")
        if self.status != "done" and self.scores:
            raise ValueError(f"a card of status {self.status!r} has no scores")
        if self.scores and not self.baselines:
            raise ValueError("scores need their baselines beside them")
        return self


def card_key(settings: Mapping[str, Any], source: str) -> str:
    """Return the name of a cell's result: equal for equal settings run by equal code.

    Args:
        settings: Everything that decides the cell's numbers, as plain JSON values.
        source: Of the code, and of the data and the user's modules that it ran on.

    Returns:
        16 hexadecimal digits.

    Raises:
        CardError: A setting is not a JSON value, or not finite.
    """
    try:
        canonical = json.dumps(
            {"settings": settings, "source": source},
            sort_keys=True,
            separators=(",", ":"),
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise CardError(f"a cell's settings must be finite JSON values: {error}") from error
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def source_hash(root: Path | None = None) -> str:
    """Return a hash of the Python sources that results depend on: their paths and contents.

    Args:
        root: The folder that holds the packages; by default the one this package was imported from.

    Returns:
        16 hexadecimal digits.

    Raises:
        CardError: None of the packages is there.
    """
    home = Path(root) if root is not None else Path(__file__).resolve().parents[2]
    files = sorted(file for name in PACKAGES for file in (home / name).rglob("*.py"))
    if not files:
        raise CardError(f"no sources of {', '.join(PACKAGES)} in {home}")
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(home).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def write_card(card: Card, folder: Path) -> Path:
    """Write a card into a results folder, whole or not at all.

    Args:
        card: The result.
        folder: The results folder; the card goes to its ``cards`` folder.

    Returns:
        The file, ``cards/<key>.json``; one of the same key is replaced.
    """
    target = Path(folder) / "cards" / f"{card.key}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(card.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"
    with written_whole(target) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return target


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Let a file appear, or be replaced, whole or not at all.

    Args:
        target: The file; its folder exists.

    Yields:
        The path to write to instead, which becomes the target once the body has ended. A body that
        raises leaves the target as it was, and nothing beside it; of a full disk the error names
        the folder.
    """
    # Beside the target, since a rename is atomic only within one file system.
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with naming_folder(target.parent):
            yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_cards(folder: Path) -> list[Card]:
    """Read every card of a results folder, in the order of their keys.

    Args:
        folder: The results folder, the one that holds ``cards``.

    Returns:
        The cards; none if nothing was written yet.

    Raises:
        CardError: A file is not a card of this format version.
    """
    cards = []
    for file in sorted((Path(folder) / "cards").glob("*.json")):
        try:
            cards.append(_read(file))
        except (OSError, ValueError) as error:
            raise CardError(
                f"{file} is not a card: {error}; delete it, and its cell runs anew"
            ) from error
    return cards


def peak_memory() -> int:
    """Return the most memory this process has held so far: resident bytes, children excluded."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # kilobytes but on macOS


def _read(file: Path) -> Card:
    """Read one card, or raise what is wrong with it (a ``ValueError`` or ``OSError``)."""
    content = json.loads(file.read_text(encoding="utf-8"))
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        older = _OLDER.get(version, "") if isinstance(version, int) else ""
        raise ValueError(
            f"its format version is {version!r}{older}, and only {SCHEMA_VERSION} is read"
        )
    card = Card.model_validate(content)
    if card.key != file.stem:
        raise ValueError(f"it holds the card {card.key}, whose file is {card.key}.json")
    return card


def _counted(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _finite(value: object, place: str, places: list[str]) -> object:
    """Return a value with its non-finite numbers as ``None``, and note where they were."""
    if isinstance(value, float) and not math.isfinite(value):
        places.append(place)
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item, f"{place}.{key}", places) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, f"{place}[{index}]", places) for index, item in enumerate(value)]
    return value
