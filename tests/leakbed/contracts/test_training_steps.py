"""What a defence is given of a training step, and how it is blamed for what is no answer."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from defenses import DPSGD, AdversarialTraining, LabelDP, LocalDP, SmashedNoise
from leakbed.contract_trials import defense_breaches
from leakbed.contracts import (
    BrokenPluginError,
    Defense,
    DefenseState,
    IllegalCombinationError,
    TrainingStep,
)
from leakbed.contracts.training_steps import ask, refuse_stack
from tests.support import stepping
from tests.support.stepping import AuxiliaryHead, Mixup, Proximal, RowClipping, Training


def a_step() -> TrainingStep:
    """A bottom with BatchNorm after backpropagation."""
    stream = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, generator=stream)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    output = module(images)
    output.backward(torch.ones_like(output), retain_graph=True)
    return replace(
        stepping.step(images, output, torch.arange(4) % 2),
        module=module,
        output_gradient=torch.ones_like(output),
        gradients={n: torch.zeros_like(p) for n, p in module.named_parameters()},
    )


def answering(answer: Callable[[DefenseState, TrainingStep], Any]) -> Any:
    """A defence that answers so."""

    class Answering(Training):
        name: ClassVar[str] = "answering"

        def train_step(self, state: DefenseState, step: TrainingStep) -> Any:
            return answer(state, step)

    return Answering()


def own(step: TrainingStep) -> Tensor:
    return step.output.square().mean()


def writing(state: DefenseState, step: TrainingStep) -> Any:
    with torch.no_grad():
        step.weights["0.weight"].add_(1)
    return state, None


def stepping_back(state: DefenseState, step: TrainingStep) -> Any:
    own(step).backward(retain_graph=True)  # type: ignore[no-untyped-call]
    return state, None


def counting(state: DefenseState, step: TrainingStep) -> Any:
    return state, step.module(step.images).square().mean()


def beginning(state: DefenseState, step: TrainingStep) -> Any:
    return replace(state, trained={"w": torch.zeros(3)}), own(step)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda state, step: own(step), "returned Tensor from train_step; return the next state"),
        (lambda state, step: (own(step), state), "returned tuple from train_step"),
        (lambda state, step: None, "returned NoneType from train_step"),
        (lambda state, step: (state, 0.5), "returned a builtins.float where a torch tensor"),
        (lambda state, step: (state, step.output), "of shape (4, 2) where () belongs as loss"),
        (lambda state, step: (state, own(step) / 0), "a value that is not finite as loss"),
        (lambda state, step: (state, own(step).detach()), "a number that depends on nothing that"),
        (lambda state, step: (state, {}), "returned [] where ['0.bias', '0.weight', '1.bias'"),
        (
            lambda state, step: (state, {n: g[:1] for n, g in step.gradients.items()}),
            "a tensor of shape",
        ),
        (
            lambda state, step: (state, {n: g / 0 for n, g in step.gradients.items()}),
            "not finite",
        ),
        (lambda state, step: (replace(state, tensors={"n": 1}), None), "keeps int 'n' in its st"),
        (
            lambda state, step: (replace(state, trained={"w": torch.ones(2) / 0}), None),
            "not finite as its own weight 'w'",
        ),
        (lambda state, step: step.missing, "raised AttributeError"),
        (writing, "changed the weight '0.weight' in train_step; work on a clone"),
        (stepping_back, "changed the gradient of '0.weight' in train_step"),
        (counting, "changed the buffer '1.num_batches_tracked' in train_step"),
        (lambda state, step: (state, own(replace(step, output=step.output.mul_(2)))), "step.outpu"),
    ],
)
def test_what_is_no_answer_is_blamed_by_name(answer: Any, said: str) -> None:
    defense = answering(answer)
    with pytest.raises(BrokenPluginError, match=re.escape(said)) as caught:
        ask(defense, defense.begin(1), a_step())
    assert str(caught.value).startswith("the code of defence answering (")


def test_own_weights_keep_their_names_and_shapes() -> None:
    defense = answering(beginning)
    begun = ask(defense, defense.begin(1), a_step()).state
    assert begun.trained["w"].tolist() == [0, 0, 0]
    with pytest.raises(BrokenPluginError, match=r"of shape \(3,\) where \(2,\) belongs as w"):
        ask(defense, replace(begun, trained={"w": torch.zeros(2)}), a_step())


def test_own_weights_are_leaves_of_their_own_while_it_is_asked() -> None:
    seen: list[Tensor] = []

    def answer(state: DefenseState, step: TrainingStep) -> Any:
        seen.append(state.trained["w"])
        return state, state.trained["w"].sum() * own(step)

    kept = torch.ones(2)
    defense = answering(answer)
    found = ask(defense, replace(defense.begin(1), trained={"w": kept}), a_step())
    assert seen[0].is_leaf
    assert seen[0].requires_grad
    assert seen[0].data_ptr() != kept.data_ptr()
    assert found.leaves["w"] is seen[0]
    assert not found.state.trained["w"].requires_grad


def test_own_weights_it_trains_itself_are_no_leaves_any_more() -> None:
    def answer(state: DefenseState, step: TrainingStep) -> Any:
        return replace(state, trained={"w": state.trained["w"] + 1}), None

    defense = answering(answer)
    found = ask(defense, replace(defense.begin(1), trained={"w": torch.ones(2)}), a_step())
    assert found.leaves == {}
    assert found.state.trained["w"].tolist() == [2, 2]


def test_the_global_generators_are_seeded_from_its_stream_and_put_back() -> None:
    def answer(state: DefenseState, step: TrainingStep) -> Any:
        return replace(state, tensors={"drawn": torch.rand(3)}), None

    defense = answering(answer)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    drawn = [
        ask(defense, state, a_step()).state.tensors["drawn"]
        for state in (defense.begin(1), defense.begin(1), defense.begin(1).next())
    ]
    torch.manual_seed(7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_module_that_is_run_again_counts_no_batch_and_gives_the_same() -> None:
    step = a_step()
    before = {name: value.clone() for name, value in step.module.named_buffers()}
    assert torch.equal(step.rerun(step.images), step.output)
    assert all(torch.equal(before[name], value) for name, value in step.module.named_buffers())


@pytest.mark.parametrize("defense", [Proximal(), RowClipping(), AuxiliaryHead(), Mixup()])
def test_a_plug_in_that_keeps_the_contract_passes_the_trial(defense: Any) -> None:
    assert defense_breaches(defense) == []


def test_a_trial_finds_an_answer_that_changes() -> None:
    count: list[int] = []

    def answer(state: DefenseState, step: TrainingStep) -> Any:
        count.append(1)
        return state, len(count) * own(step)

    (said,) = defense_breaches(answering(answer))
    assert said == "answers twice otherwise in train_step from one state; draw from " + (
        "state.generator()"
    )


class Claiming(RowClipping):
    """Another one that claims."""

    name: ClassVar[str] = "claiming"


class Looking(Training):
    """Has no hook in the step."""

    name: ClassVar[str] = "looking"

    def inspect(self, state: DefenseState, step: Any) -> DefenseState:
        return state


@pytest.mark.parametrize(
    ("stack", "said"),
    [
        ((RowClipping(), Proximal()), "proximal takes part in a training step beside row-clipping"),
        ((Proximal(), RowClipping()), "proximal takes part in a training step beside row-clipping"),
        ((RowClipping(), Looking(), Mixup()), "mixup takes part in a training step beside row-cli"),
        ((RowClipping(), Claiming()), "claiming takes part in a training step beside row-clipping"),
    ],
)
def test_nothing_else_takes_part_in_a_step_that_is_claimed_private(stack: Any, said: str) -> None:
    with pytest.raises(IllegalCombinationError, match=f"^{said}.*; leave one of them out"):
        refuse_stack(stack)


class MixingImages(Training):
    """Shows the bottom images that are made of two rows each."""

    name: ClassVar[str] = "mixing-images"

    def alter_images(self, state: DefenseState, images: Tensor, rows: Tensor) -> Tensor:
        return (images + images.flip(0)) / 2


@pytest.mark.parametrize("private", [RowClipping(), DPSGD(), SmashedNoise(clip=1.0)])
def test_images_that_mix_rows_do_not_stand_beside_a_claim_about_rows(private: Defense) -> None:
    why = f"^mixing-images alters images .* {private.name} is worth less than it claims; leave one"
    for stack in ((MixingImages(), private), (private, MixingImages())):
        with pytest.raises(IllegalCombinationError, match=why):
            refuse_stack(stack)


def test_images_of_one_row_each_and_claims_of_other_things_stand_together() -> None:
    refuse_stack((AdversarialTraining(), DPSGD(), RowClipping()))
    refuse_stack((MixingImages(), LocalDP(), SmashedNoise(), LabelDP()))


def test_what_claims_nothing_or_has_no_hook_in_the_step_may_stand_anywhere() -> None:
    refuse_stack((Looking(), RowClipping(), Looking()))
    refuse_stack((Proximal(), AuxiliaryHead(), Proximal()))
