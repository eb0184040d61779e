"""Steps of the top that a defence may change: each sample's own gradient, by opacus.

Opacus's hooks see every layer's backward pass and leave each sample's gradient beside the batch's;
what the defence makes of them is what the optimiser steps with. The gradient of what the top
received is none of their business: it leaves as it is.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from leakbed.contracts import Defense, IllegalCombinationError, Protects


class PrivateSteps:
    """The defence of a top's steps, with its state."""

    def __init__(self, module: nn.Module, defence: Defense, *, stream: int) -> None:
        """Hook into the module.

        Args:
            module: The top; its batches' losses are means.
            defence: Of its steps.
            stream: The secret seed of its noise.

        Raises:
            IllegalCombinationError: If samples of a batch do not have gradients of their own.
        """
        from opacus.grad_sample import GradSampleModule  # noqa: PLC0415  seconds that few runs need
        from opacus.validators import ModuleValidator  # noqa: PLC0415

        if errors := ModuleValidator.validate(module, strict=False):
            raise IllegalCombinationError(
                f"{defence.name} needs each sample's own gradient, which this top does not have: "
                f"{'; '.join(map(str, errors))}; cut above that layer, or use another network"
            )
        self._module = module
        self._hooks = GradSampleModule(module, batch_first=True, loss_reduction="mean")
        self._defence, self._state = defence, defence.begin(stream)

    @classmethod
    def of(
        cls, module: nn.Module, defences: Sequence[Defense], *, stream: int
    ) -> "PrivateSteps | None":
        """Return the steps of a top; None where no defence changes them.

        Args:
            module: The top.
            defences: All of the server's.
            stream: The secret seed of their noise.

        Returns:
            Hooked into the module.

        Raises:
            IllegalCombinationError: If there are several, or samples have no gradients of their
                own.
        """
        chosen = [(i, each) for i, each in enumerate(defences) if Protects.TOP in each.protects]
        if len(chosen) > 1:
            names = " and ".join(defence.name for _, defence in chosen)
            raise IllegalCombinationError(f"{names} all change the top's steps; keep one of them")
        return cls(module, chosen[0][1], stream=stream + chosen[0][0]) if chosen else None

    def replace_gradients(self) -> None:
        """Put what the defence makes of the samples' gradients in the place of the batch's."""
        # Any: opacus hangs its own attribute on parameters.
        weights: dict[str, Any] = {
            name: each for name, each in self._module.named_parameters() if each.requires_grad
        }
        samples = {name: weight.grad_sample for name, weight in weights.items()}
        state, made = self._defence.protect_weight_gradients(self._state, samples)
        self._state = state.next()
        for name, weight in weights.items():
            weight.grad, weight.grad_sample = made[name], None


def refuse_private_copies(defences: Sequence[Defense]) -> None:
    """Refuse defences of a top's steps where every node has a top of its own.

    Args:
        defences: All of the server's.

    Raises:
        IllegalCombinationError: If there is one.
    """
    for defence in defences:
        if Protects.TOP in defence.protects:
            raise IllegalCombinationError(
                f"{defence.name} makes the steps of one top private, but here every node has a "
                "copy of its own; use 'vanilla-split', 'parallel-split' or 'splitfed-v2'"
            )
