"""Which hooks are called for what: one that nobody would call is refused by name."""

import pytest

from defenses import DEFENSES
from leakbed.contracts import Defense, Protects
from leakbed.contracts.hooks import UncalledHookError, refuse_uncalled, untrained
from tests.support import stepping


def made(protects: set[Protects], *hooks: str) -> type[Defense]:
    """A defence that has these methods."""
    body = {hook: lambda *_, **__: None for hook in hooks}
    return type("Made", (Defense,), {"name": "made", "protects": frozenset(protects), **body})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            made({Protects.TRAINING}, "protect_smashed"),
            "made overrides protect_smashed but protects training; nobody would call it",
        ),
        (
            made({Protects.SMASHED}, "protect_smashed", "train_step"),
            "made overrides train_step but protects smashed; nobody would call it: add training",
        ),
        (
            made({Protects.SMASHED}, "protect_smashed", "prepare"),
            "made overrides prepare but protects smashed; nobody would call it: add training",
        ),
        (
            made({Protects.SMASHED}, "protect_smashed_data"),
            "made protects smashed but overrides no hook of it; did you mean protect_smashed?",
        ),
        (
            made({Protects.SMASHED, Protects.TRAINING}, "protect_smashed"),
            "made protects training but overrides no hook of it; override train_step or protect_l",
        ),
        (
            made({Protects.TRAINING}, "penalty"),
            "made protects training but overrides no hook of it; did you mean train_step?",
        ),
        (
            made({Protects.TRAINING}, "alter_images", "penalty"),
            "made has a method penalty, which nobody would call; did you mean train_step?",
        ),
        (
            made({Protects.TRAINING}, "alter_images", "training_step"),
            "made has a method training_step, which nobody would call; did you mean train_step?",
        ),
        (made(set(), "protect_update"), "made overrides protect_update but protects nothing"),
        (
            made({Protects.CUT_GRADIENT}, "protect_cut_gradient", "protect_labeled_gradient"),
            "made has a method protect_labeled_gradient, which nobody would call; did you mean "
            "protect_labelled_gradient?",
        ),
    ],
)
def test_a_hook_that_nobody_would_call_is_refused(kind: type[Defense], said: str) -> None:
    with pytest.raises(UncalledHookError) as caught:
        refuse_uncalled(kind)
    assert str(caught.value).startswith(said)


def test_an_inherited_hook_counts_and_other_methods_may_have_any_name() -> None:
    refuse_uncalled(made({Protects.TOP}, "protect_weight_gradients", "score", "noise_multiplier"))
    refuse_uncalled(made({Protects.TRAINING}, "train_step", "penalty"))  # a helper of that hook
    base = made({Protects.UPDATE}, "protect_update")
    refuse_uncalled(type("Heir", (base,), {"name": "heir"}))


@pytest.mark.parametrize(
    ("kind", "exchanges", "said"),
    [
        (stepping.Proximal, "weights", None),
        (stepping.Proximal, "split", None),
        (DEFENSES["adversarial-training"], "weights", None),
        (DEFENSES["nopeek"], "split", None),
        (
            DEFENSES["nopeek"],
            "weights",
            "nopeek takes part in training where nodes exchange 'split', and this protocol "
            "exchanges 'weights'",
        ),
        (stepping.Mixup, "split", "mixup takes part in training where nodes exchange 'weights', "),
        (DEFENSES["splitout"], "weights", "splitout overrides inspect, which is called where a "),
        (
            DEFENSES["splitguard"],
            "weights",
            "splitguard overrides protect_labels, which is called where a network is split",
        ),
    ],
)
def test_a_hook_that_a_kind_of_protocol_has_no_use_for_is_refused(
    kind: type[Defense], exchanges: str, said: str | None
) -> None:
    why = untrained(kind, exchanges)
    assert (why or "").startswith(said or "")
    assert (why is None) == (said is None)
