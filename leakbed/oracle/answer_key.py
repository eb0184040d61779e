"""The answer key: the private truth behind a trace, in a second folder never copied with it.

Only the oracle opens it. It holds private and test images with their labels, the rows of every
batch of every round, and the bottoms a server never saw.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from leakbed.attributes import attribute_of
from leakbed.events import Arrays, Phase
from leakbed.oracle.truth import Truth
from leakbed.seeds import derive
from leakbed.strips import strip
from leakbed.targets import Target

CANDIDATES = 1000  # identification is among this many private samples, or all there are
_ABOUT, _IMAGES, _BOTTOM = "answers.json", "images.safetensors", "bottom.safetensors"
_FORMAT = "leakbed-answers"


class AnswerKeyError(ValueError):
    """A folder that holds no answer key, or one that does not belong to the trace."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerKey:
    """What the oracle knows of one training run.

    Attributes:
        images: Private images of all nodes, pixel values in [0, 1].
        labels: Their labels.
        test_images: Held-out images, in test order.
        test_labels: Their labels.
        order: Rows of ``images`` in each batch, by (node, round, step).
        num_classes: Number of labels.
        public_images: What the adversary owns, for evidence-free baselines.
        public_labels: Their labels.
        bottom: The victim's last bottom, where the protocol has one.
        parties: How many nodes hold a strip of every image; 1 where nodes hold whole ones.
        classes: What each label means, where it is known.
    """

    images: Float[Tensor, " rows channels height width"]
    labels: Int[Tensor, " rows"]
    test_images: Float[Tensor, " test channels height width"]
    test_labels: Int[Tensor, " test"]
    order: Mapping[tuple[int, int, int], Sequence[int]]
    num_classes: int
    public_images: Float[Tensor, " public channels height width"]
    public_labels: Int[Tensor, " public"]
    bottom: Arrays | None = None
    parties: int = 1
    classes: tuple[str, ...] = ()

    def write(self, folder: Path, *, trace: Path | None = None) -> None:
        """Write the key to a new folder, readable by its owner only.

        Args:
            folder: Made if absent.
            trace: The finished trace it answers; None leaves open which one that is.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tensors = {
            "images": _small(self.images),
            "labels": self.labels,
            "test_images": _small(self.test_images),
            "test_labels": self.test_labels,
            "public_images": _small(self.public_images),
            "public_labels": self.public_labels,
        }
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / _IMAGES)
        if self.bottom is not None:
            bottom = {k: torch.from_numpy(np.array(v)) for k, v in self.bottom.items()}
            save_file(bottom, folder / _BOTTOM)
        order = [[*place, list(map(int, rows))] for place, rows in self.order.items()]
        about = {
            "format": _FORMAT,
            "trace": None if trace is None else _fingerprint(trace),
            "sums": {file.name: _sum(file) for file in sorted(folder.glob("*.safetensors"))},
            "num_classes": self.num_classes,
            "parties": self.parties,
            "classes": self.classes,
            "order": order,
        }
        (folder / _ABOUT).write_text(json.dumps(about))
        for file in folder.iterdir():
            file.chmod(0o600)

    @classmethod
    def read(cls, folder: Path, *, trace: Path | None = None) -> "AnswerKey":
        """Open an answer key.

        Args:
            folder: Where :meth:`write` put it.
            trace: What is to be scored by it; None asks nothing.

        Returns:
            The key.

        Raises:
            AnswerKeyError: If there is none, it was altered, or it answers another trace.
        """
        about = _about(folder)
        if trace is not None and about.get("trace") not in {None, _fingerprint(trace)}:
            raise AnswerKeyError(
                f"{folder} answers another run than {trace}; name the answers folder beside the "
                "run's own trace"
            )
        for name, expected in about.get("sums", {}).items():
            if not (folder / name).is_file() or _sum(folder / name) != expected:
                raise AnswerKeyError(f"{folder / name} was altered or is missing; copy it again")
        tensors = load_file(folder / _IMAGES)
        bottom = folder / _BOTTOM
        arrays = {k: v.numpy() for k, v in load_file(bottom).items()} if bottom.is_file() else None
        order = {(node, round_, step): rows for node, round_, step, rows in about["order"]}
        images = {k: _large(v) if "images" in k else v for k, v in tensors.items()}
        return cls(
            **images,
            order=order,
            num_classes=about["num_classes"],
            bottom=arrays,
            parties=about.get("parties", 1),
            classes=tuple(about.get("classes", ())),
        )

    def truth(self, targets: Sequence[Target], *, attribute: str | None = None) -> Truth:
        """Return the truth behind some targets; of a party's, its strips of the images.

        Args:
            targets: All of one phase, and of one party where parties hold strips.
            attribute: What is inferred of them, a key of :mod:`leakbed.attributes`; None for
                nothing.

        Returns:
            Their images and labels among up to 1,000 candidates.

        Raises:
            AnswerKeyError: If a target's batch is not in the key, or they are of several parties.
        """
        if self.parties > 1 and len({target.node for target in targets}) > 1:
            raise AnswerKeyError("the truth of several parties has several shapes; ask one by one")
        party = targets[0].node
        testing = targets[0].phase == Phase.EVALUATE
        images = self._seen_by(party, self.test_images if testing else self.images)
        public = self._seen_by(party, self.public_images)
        labels = self.test_labels if testing else self.labels
        try:
            rows = torch.tensor([self._rows(target) for target in targets])
        except KeyError as missing:
            raise AnswerKeyError(
                f"the answer key knows no batch {missing} (node, round, step); is it another run's?"
            ) from None
        truth = Truth.among(
            images,
            labels,
            rows=rows,
            num_classes=self.num_classes,
            stream=derive(0, "candidates"),  # any fixed one: the oracle has no secret to keep
            public_images=public if len(public) else None,
            public_labels=self.public_labels if len(self.public_labels) else None,
            limit=CANDIDATES,
        )
        inferred = None if attribute is None else attribute_of(attribute, self.classes)
        return replace(truth, attribute=inferred)

    def _seen_by(self, party: int, images: Tensor) -> Tensor:
        return strip(images, party=party, parties=self.parties) if self.parties > 1 else images

    def _rows(self, target: Target) -> list[int]:
        """Return the rows one target hides."""
        if target.phase == Phase.EVALUATE:
            return [target.step + int(target.row or 0)]
        if target.row is not None:
            return [int(self.order[target.node, target.round, target.step][target.row])]
        rows: list[int] = []
        step = 0
        while (target.node, target.round, step) in self.order:
            rows += self.order[target.node, target.round, step]
            step += 1
        if not rows:
            raise KeyError((target.node, target.round, 0))
        return rows


def _about(folder: Path) -> dict[str, Any]:
    """Return what a key says of itself, or say why it is none."""
    path = folder / _ABOUT
    if not path.is_file():
        raise AnswerKeyError(f"{folder} holds no answer key: there is no {_ABOUT}")
    try:
        about = json.loads(path.read_text())
    except ValueError as error:
        raise AnswerKeyError(f"{path} was altered or truncated: {error}") from error
    found = about.get("format") if isinstance(about, dict) else None
    if found != _FORMAT:
        raise AnswerKeyError(f"{path} is format {found!r}, not {_FORMAT!r}")
    return dict(about)


def _fingerprint(trace: Path) -> str:
    """Return the checksum of a trace's index, which holds those of all its records."""
    return _sum(trace / "index.jsonl")


def _sum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _small(images: Tensor) -> Tensor:
    """Return 8-bit images as such, which is exact, and others unchanged."""
    eight = (images * 255).round().to(torch.uint8)
    return eight if torch.equal(_large(eight), images) else images


def _large(images: Tensor) -> Tensor:
    return images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images
