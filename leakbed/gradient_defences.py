"""The defences of the cut gradients that one party sends, in order, each with its state."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from leakbed.contracts import Defense, DefenseState


class GradientDefences:
    """What stands between a label holder's cut gradients and the wire.

    Attributes:
        states: Of each defence, after the last message; may be replaced by stored ones.
    """

    def __init__(self, defences: Sequence[Defense], *, stream: int) -> None:
        """Begin.

        Args:
            defences: In the order they are applied in.
            stream: The secret seed of their noise.
        """
        self._defences = tuple(defences)
        self.states: list[DefenseState] = [
            defence.begin(stream + index) for index, defence in enumerate(self._defences)
        ]

    def protect(
        self, gradient: Float[Tensor, " batch *cut"], labels: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, " batch *cut"]:
        """Return a cut gradient as it may be sent; a defence that cannot work raises its own error.

        Args:
            gradient: On the CPU; never changed.
            labels: Of its rows; None where this party has none.

        Returns:
            What every defence in turn made of it.
        """
        states = []
        for defence, state in zip(self._defences, self.states, strict=True):
            if labels is None:
                after, gradient = defence.protect_cut_gradient(state, gradient)
            else:
                after, gradient = defence.protect_labelled_gradient(state, gradient, labels)
            states.append(after.next())
        self.states = states
        return gradient
