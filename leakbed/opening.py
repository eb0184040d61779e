"""What an adversary knows before the first message: its own images, shapes, and no evidence.

An active adversary begins with this view and gets every smashed batch as it comes; a passive one
finds the same images in the trace.
"""

from typing import Any

import torch

from leakbed.contracts import Knowledge, ThreatModel, View
from leakbed.events import Arrays
from leakbed.models import Architecture
from leakbed.targets import MisfitError

ADVERSARY, PUBLIC = "adversary", "public"


def opening_view(
    threat: ThreatModel,
    architecture: Architecture,
    *,
    rows: int,
    public: Arrays | None,
    device: torch.device,
) -> View:
    """Grant an active adversary's seat what it may read before the first message.

    Args:
        threat: The adversary's.
        architecture: The network, cut.
        rows: Size of the batches to come, which the first one would tell.
        public: Images and labels that adversaries own, if any.
        device: Where the adversary computes.

    Returns:
        A view without targets.
    """
    granted: dict[str, Any] = {}
    if Knowledge.PUBLIC_IMAGES in threat.needs:
        granted |= owned(public, device)
    if Knowledge.ARCHITECTURE in threat.needs:
        granted["architecture"] = architecture
    return View(
        seat=threat.seat,
        image_shape=architecture.image_shape,
        num_classes=architecture.num_classes,
        targets=0,
        rows=rows,
        smashed_shape=architecture.smashed_shape,
        device=device,
        **granted,
    )


def owned(held: Arrays | None, device: torch.device) -> dict[str, Any]:
    """Return public images and labels as fields of a view.

    Args:
        held: What the adversary owns, as a trace keeps it; None if it owns nothing.
        device: Where it computes.

    Returns:
        ``public_images`` and ``public_labels``.

    Raises:
        MisfitError: If it owns nothing.
    """
    if held is None:
        raise MisfitError(
            "the attack needs public images; set data.public above 0, or, in a tapped app, "
            f"recorder.hold({ADVERSARY!r}, {PUBLIC!r}, {{'images': ..., 'labels': ...}})"
        )
    return {
        "public_images": torch.from_numpy(held["images"]).to(device),
        "public_labels": torch.from_numpy(held["labels"]).to(device),
    }
