"""The defences of the cut gradients that one party sends, in order, each with its state."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, IllegalCombinationError


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

        Raises:
            IllegalCombinationError: If :func:`refuse_order` does.
        """
        refuse_order(defences)
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


def refuse_order(defences: Sequence[Defense]) -> None:
    """Refuse what looks at labels again after a claim of privacy was made of a gradient.

    Args:
        defences: Of one party's cut gradients, in the order they are applied in.

    Raises:
        IllegalCombinationError: If one does.
    """
    claimed: Defense | None = None
    for defence in defences:
        looks = type(defence).protect_labelled_gradient is not Defense.protect_labelled_gradient
        if claimed is not None and looks:
            raise IllegalCombinationError(
                f"{defence.name} looks at labels after {claimed.name} has made the gradient "
                f"private, which voids its claim; put {defence.name} first"
            )
        if defence.claims:
            claimed = defence
