"""Asking a defence about one training step, and blaming it by name for what is no answer.

A defence's own weights are leaves while it is asked, so that what it returns can train them; the
global generators are seeded from its own stream. What it may not change is watched by torch's own
count of writes to each tensor.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from leakbed.contract_checks import blame, blamed, refuse_loss, refuse_state, refuse_unsent
from leakbed.contracts import (
    BrokenPluginError,
    Defense,
    DefenseState,
    IllegalCombinationError,
    Protects,
    TrainingStep,
)
from leakbed.seeds import derive, scoped
from leakbed.tensors import finite


@dataclass(frozen=True, kw_only=True, eq=False)
class Answered:
    """What a defence made of a training step.

    Attributes:
        state: Its next one, detached and on the CPU.
        loss: To minimise beside the task's, with its graph; None for none.
        gradients: In place of the task's, by name; None where those stay.
        leaves: Its own weights as it was given them, those of them that it returned as they were.
    """

    state: DefenseState
    loss: Float[Tensor, ""] | None
    gradients: Mapping[str, Tensor] | None
    leaves: Mapping[str, Tensor]


def takes_part(defense: Defense) -> bool:
    """Return whether a defence has a hook in the training step."""
    return type(defense).train_step is not Defense.train_step


def refuse_stack(defenses: Sequence[Defense]) -> None:
    """Refuse defences of one training among which a claim of privacy does not hold.

    Losses of all defences are added to the gradients that the last one put in place of the task's,
    in whatever order they stand, and without the claim's noise; gradients of a later one take the
    place of the noised ones. Of images that mix rows one sample moves several, and the gradients
    and smashed rows of several, which a claim about one sample does not allow for.

    Args:
        defenses: All of the run, in their order.

    Raises:
        IllegalCombinationError: If one that claims has a hook in the step, and another has one too;
            or if one that alters images, and does not say that it is ``row_wise``, stands beside
            one that claims privacy of a sample in a training step or in smashed data.
    """
    taking = [each for each in defenses if takes_part(each)]
    private = next((each for each in taking if each.claiming), None)
    others = [each for each in taking if each is not private]
    if private is not None and others:
        raise IllegalCombinationError(
            f"{others[0].name} takes part in a training step beside {private.name}, whose claim of "
            "privacy covers no loss and no gradients that others put into the step; leave one of "
            "them out"
        )
    for claim in filter(_claims_samples, defenses):
        for other in defenses:
            alters = type(other).alter_images is not Defense.alter_images
            if other is not claim and alters and not other.row_wise:
                raise IllegalCombinationError(
                    f"{other.name} alters images and does not say that it is row_wise, so one "
                    f"sample may move other rows too and {claim.name} is worth less than it "
                    "claims; leave one of them out"
                )


def _claims_samples(defense: Defense) -> bool:
    """Say whether a defence claims privacy of single samples behind the images that are shown."""
    hooks = defense.protects & {Protects.TOP, Protects.SMASHED}
    return defense.claiming and (bool(hooks) or takes_part(defense))


def ask(defense: Defense, state: DefenseState, step: TrainingStep) -> Answered:
    """Ask a defence about a training step.

    What it raises, and what it returns that is no loss, no gradients and no state, is a
    :class:`~leakbed.contracts.BrokenPluginError` with its name.

    Args:
        defense: Which has the hook.
        state: Its own.
        step: What the node knows of it; nothing in it may be written to.

    Returns:
        The answer, sound in type, shape and finiteness.
    """
    device = step.output.device
    leaves = {
        name: value.detach().to(device, copy=True).requires_grad_()
        for name, value in state.trained.items()
    }
    before = dict(_writes(step))
    with (
        blamed(defense, "defence"),
        scoped(derive(state.stream, f"train-step/{state.messages}")),
        torch.enable_grad(),
    ):
        answer = defense.train_step(replace(state, trained=leaves), step)
    _refuse_written(defense, before, dict(_writes(step)))
    after, taught = _parts(defense, answer)
    loss = taught if isinstance(taught, Tensor) else None
    if isinstance(taught, Mapping):
        refuse_unsent(defense, taught, step.gradients)
        taught = {name: value.detach() for name, value in taught.items()}
    else:
        refuse_loss(defense, taught, step.output)
    _refuse_weights(defense, state, after, sound=finite(step.output.detach()))
    kept = {name: leaf for name, leaf in leaves.items() if after.trained[name] is leaf}
    return Answered(
        state=replace(after, tensors=_still(after.tensors), trained=_still(after.trained)),
        loss=loss,
        gradients=None if taught is loss else taught,
        leaves=kept,
    )


def _still(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without graphs, on the CPU; what is written to later is not theirs."""
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def _parts(defense: Defense, answer: Any) -> tuple[DefenseState, Any]:  # noqa: ANN401  a stranger's
    pair = isinstance(answer, tuple) and len(answer) == 2  # noqa: PLR2004  a pair
    if not pair or not isinstance(answer[0], DefenseState):
        said = (
            f"returned {type(answer).__name__} from train_step; return the next state, and a loss, "
            "gradients by name, or None"
        )
        raise BrokenPluginError(blame(defense, "defence", said))
    return answer[0], answer[1]


def _refuse_weights(
    defense: Defense, before: DefenseState, after: DefenseState, *, sound: bool
) -> None:
    """Refuse a state that cannot be kept, and own weights not as before, or not finite."""
    refuse_state(defense, after)
    if before.trained:
        refuse_unsent(defense, after.trained, before.trained)
    for name, value in after.trained.items():
        if sound and not finite(value.detach()):
            said = f"returned values that are not finite as its own weight {name!r}"
            raise BrokenPluginError(blame(defense, "defence", said))


def _refuse_written(
    defense: Defense, before: Mapping[str, object], after: Mapping[str, object]
) -> None:
    """Refuse a hook that wrote to what the node trains, or to what it was shown."""
    for name, writes in after.items():
        if before.get(name) != writes:
            said = (
                f"changed {name} in train_step; work on a clone, return gradients instead of "
                "calling backward, and run the module by step.rerun"
            )
            raise BrokenPluginError(blame(defense, "defence", said))


def _writes(step: TrainingStep) -> Iterator[tuple[str, object]]:
    """Yield what a hook may not write to, with the tensor's identity and how often it was."""
    for name, value in vars(step).items():
        if isinstance(value, Tensor):
            yield f"step.{name}", value._version  # noqa: SLF001  torch has no public count
    for name, weight in step.module.named_parameters():
        gradient = weight.grad
        yield f"the weight {name!r}", (id(weight), weight._version)  # noqa: SLF001
        written = None if gradient is None else (id(gradient), gradient._version)  # noqa: SLF001
        yield f"the gradient of {name!r}", written
    for name, value in step.module.named_buffers():
        yield f"the buffer {name!r}", (id(value), value._version)  # noqa: SLF001
