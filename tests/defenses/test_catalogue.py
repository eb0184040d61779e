import ast
import dataclasses
from pathlib import Path

import pytest
import torch

import defenses
from defenses import DEFENSES, DPCutGradient, LocalDP, SmashedNoise, WeightNoise
from leakbed.contract_trials import defense_breaches
from leakbed.contracts import Defense
from leakbed.contracts.defense import Holdings, ReturnedGradient
from leakbed.contracts.hooks import refuse_uncalled
from tests.support import stepping, tiny

FOLDER = Path(defenses.__file__).parent


def test_every_file_is_in_the_catalogue_under_its_own_name() -> None:
    files = {
        path.stem.replace("_", "-")
        for path in FOLDER.glob("*.py")
        if "(Defense)" in path.read_text()
    }
    assert set(DEFENSES) == files
    assert list(DEFENSES) == sorted(DEFENSES)
    assert all(defense.name == name for name, defense in DEFENSES.items())


def holdings() -> Holdings:
    images, labels = tiny.images()
    return Holdings(
        images=images,
        labels=labels,
        architecture=tiny.architecture(),
        bottom=tiny.architecture().bottom(0).state_dict(),
        batch_size=8,
        optimiser=tiny.plan().optimiser,
    )


@pytest.mark.parametrize("defense", DEFENSES.values(), ids=list(DEFENSES))
class TestEveryDefense:
    def test_it_is_frozen_settings_with_defaults(self, defense: type[Defense]) -> None:
        assert dataclasses.is_dataclass(defense)
        assert defense() == defense()
        settings = [field.name for field in dataclasses.fields(defense)]
        for name in [*settings, "more"]:
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(defense(), name, 1)

    def test_it_names_a_source_its_docstring_names_too(self, defense: type[Defense]) -> None:
        text = (FOLDER / f"{defense.name.replace('-', '_')}.py").read_text()
        link = defense.source.split()[-1]
        assert link.startswith("https://")
        assert link in (ast.get_docstring(ast.parse(text)) or "")

    def test_it_overrides_the_hook_of_what_it_protects(self, defense: type[Defense]) -> None:
        assert defense.protects
        refuse_uncalled(defense)

    def test_what_clips_or_has_an_epsilon_says_what_it_claims(self, defense: type[Defense]) -> None:
        settings = {field.name for field in dataclasses.fields(defense)}
        assert bool(defense.claims) == bool(settings & {"epsilon", "delta", "clip"})

    def test_only_what_has_a_claim_can_be_claiming(self, defense: type[Defense]) -> None:
        assert defense.claims or not defense().claiming

    def test_what_is_asked_of_a_strangers_holds(self, defense: type[Defense]) -> None:
        assert defense_breaches(defense()) == []

    def test_it_changes_no_tensor_it_was_given(self, defense: type[Defense]) -> None:
        tensor, other = torch.arange(12.0).reshape(3, 4), torch.ones(3, 4)
        kept, chosen = tensor.clone(), defense()
        state = chosen.begin(1)
        torch.manual_seed(0)
        generators = torch.get_rng_state()
        chosen.protect_update(state, {"w": other}, {"w": tensor})
        chosen.protect_smashed(state, tensor)
        classes = torch.tensor([0, 1, 1])
        chosen.protect_labelled_gradient(state, tensor, classes)
        chosen.protect_weight_gradients(state, {"w": tensor})
        chosen.noised_labels(1, classes, classes=2)
        assert classes.tolist() == [0, 1, 1]
        labels = torch.arange(3)
        state = chosen.prepare(state, holdings())
        chosen.train_step(state, stepping.step(other, tensor, labels))
        rows, image = torch.tensor([0, 2]), torch.full((2, 1, 6, 6), 0.5)
        chosen.alter_images(state, image, rows)
        chosen.follow_gradient(state, image, rows)
        assert torch.all(image == 0.5)
        chosen.protect_labels(state, labels, classes=3)
        seen = ReturnedGradient(cut_gradient=tensor, labels=labels, first_gradient=torch.ones(36))
        chosen.inspect(state, seen)
        assert torch.equal(labels, torch.arange(3))
        assert torch.equal(tensor, kept)
        assert torch.equal(other, torch.ones(3, 4))
        assert torch.equal(torch.get_rng_state(), generators)


@pytest.mark.parametrize(
    ("defense", "claiming"),
    [
        (SmashedNoise(), False),
        (SmashedNoise(clip=1.0), True),
        (SmashedNoise(clip=1.0, sigma=0.0), False),
        (WeightNoise(), False),
        (WeightNoise(form="corrected"), True),
        (WeightNoise(form="corrected", scale=0.0), False),
        (LocalDP(), True),
        (LocalDP(sensitivity=0.0), False),
        (DPCutGradient(), True),
    ],
)
def test_settings_under_which_nothing_is_private_claim_nothing(
    defense: Defense, claiming: bool
) -> None:
    assert defense.claiming is claiming
