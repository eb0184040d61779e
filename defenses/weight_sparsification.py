"""Weight sparsification: a node sends back only the largest entries.

The published form zeroes the smallest *weights*; the corrected form drops the smallest *changes*,
which is what an attacker reads.

Source: Zhao, Luo, Ding. "Deep Leakage from Model in Federated Learning", CPAL 2024,
https://arxiv.org/abs/2206.04887.
Departures from the source:
- Published code sparsifies both snapshots an attacker holds. A server knows the weights it sent, so
  here the upload is shifted such that the difference it forms is the published one.
- Published code meant 0 to 90 % and swept 0 to 9 %; ``ratio`` is what it says.
- ``form = "corrected"`` is ours: thresholds of two snapshots differ, so published entries near them
  jump by their own size and swamp the update.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.naming import unknown

_FORMS = ("published", "corrected")


@dataclass(frozen=True, kw_only=True)
class WeightSparsification(Defense):
    """Drop the smallest entries of each tensor.

    Attributes:
        ratio: Share of entries dropped, in [0, 1).
        form: ``"published"`` (smallest weights) or ``"corrected"`` (smallest changes).
    """

    name: ClassVar[str] = "weight-sparsification"
    source: ClassVar[str] = "Zhao, Luo, Ding, CPAL 2024, https://arxiv.org/abs/2206.04887"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.UPDATE})

    ratio: float = 0.5
    form: Literal["published", "corrected"] = "published"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If the ratio is not in [0, 1), or there is no such form.
        """
        if self.form not in _FORMS:
            raise ValueError(unknown("form", self.form, _FORMS))
        if not 0 <= self.ratio < 1:
            raise ValueError(f"weight-sparsification needs 0 <= ratio < 1, got {self.ratio}")

    def protect_update(
        self,
        state: DefenseState,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
    ) -> tuple[DefenseState, Mapping[str, Tensor]]:
        """Return the sparsified weights; integer buffers pass unchanged.

        Args:
            state: Passed through: there is nothing random here.
            before: The weights the node received.
            after: The weights it would send.

        Returns:
            The same state, and the weights to send.
        """
        return state, {
            name: self._sparsified(before[name], value) if value.is_floating_point() else value
            for name, value in after.items()
        }

    def _sparsified(self, before: Tensor, after: Tensor) -> Tensor:
        # Chosen, not summed: an entry no snapshot drops is sent as it is, to the last bit.
        if self.form == "corrected":
            return torch.where(kept(after - before, self.ratio), after, before)
        zero = torch.zeros_like(after)
        sparse_after = torch.where(kept(after, self.ratio), after, zero)
        rest_before = torch.where(kept(before, self.ratio), zero, before)
        return rest_before + sparse_after  # = before + (sparse after - sparse before)


def kept(values: Tensor, ratio: float) -> Tensor:
    """Return which values remain when the smallest are dropped.

    Args:
        values: Any shape.
        ratio: Share to drop, rounded down to whole entries.

    Returns:
        True where a value remains.
    """
    dropped = int(ratio * values.numel())
    remains = torch.ones(values.numel(), dtype=torch.bool, device=values.device)
    remains[torch.topk(values.abs().flatten(), dropped, largest=False).indices] = False
    return remains.reshape(values.shape)
