"""The law of what several defences make of a message, one after another."""

from collections.abc import Sequence
from dataclasses import replace

from leakbed.contracts import Defense
from leakbed.noise_laws import Channel, Clean, Fixed, Law
from leakbed.oracle.ceiling import NoCeilingError


def sent_law(defences: Sequence[Defense], clean: Clean) -> Law:
    """Return how what is sent is distributed, behind all of a sender's defences.

    What has no noise is a part of the message's computation; at most the last defence may have
    noise, since a function of noise has no law that is stated here.

    Args:
        defences: In their order; those of other messages are passed over.
        clean: As it is computed.

    Returns:
        The law.

    Raises:
        NoCeilingError: If a defence does not state its law, or stands behind noise.
    """
    law: Law = Fixed(mean=clean.arrays)
    noisy = ""
    for defence in defences:
        if clean.kind not in defence.protects:
            continue
        if noisy:
            raise NoCeilingError(
                f"no ceiling: {defence.name} changes what {noisy} has noised, and the law of that "
                "is not known; put it before, or leave one of them out"
            )
        made = defence.law(clean)
        if made is None:
            raise NoCeilingError(
                f"no ceiling: {defence.name} does not state the law of its noise for this message; "
                "give it a method law(clean)"
            )
        law = made
        if isinstance(law, Fixed):
            clean = replace(clean, arrays=law.mean)
        elif not isinstance(law, Channel):
            noisy = defence.name
    return law
