"""A hook that stops a run at the first value on the wire that is not finite."""

import numpy as np

from leakbed.events import Event, arrays_of


class NonFiniteError(RuntimeError):
    """A message holds NaN or infinity; says which node, round and step."""


class RefuseNonFinite:
    """Passive hook: raises on the first event with a value that is not finite."""

    def __call__(self, event: Event) -> None:
        """Check one event.

        Args:
            event: Any.

        Raises:
            NonFiniteError: If one of its arrays holds NaN or infinity.
        """
        for field, arrays in arrays_of(event).items():
            for name, array in arrays.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise NonFiniteError(
                        f"{field} {name!r} of node {event.node} is not finite in round "
                        f"{event.round}, step {event.step}; lower protocol.learning_rate"
                    )
