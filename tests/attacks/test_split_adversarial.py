"""SPADV-style: a slow literal reading, what is fitted and to what, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from attacks.building_blocks.likeness import kernel_distance, row_critic
from attacks.building_blocks.public_images import BatchSampler
from attacks.split_adversarial import SplitAdversarial
from leakbed.contracts import MissingKnowledgeError, Seat, UnfitViewError, View
from leakbed.models import Architecture
from leakbed.models.networks import BasicBlock
from leakbed.perturbation import BudgetError, refuse_beyond
from leakbed.seeds import derive, generator, scoped

NETWORK = Architecture(name="two-blocks", image_shape=(1, 8, 8), num_classes=3, cut=2, upper_cut=6)


def _view(network: Architecture = NETWORK, **changes: Any) -> View:
    drawn = generator(4)
    channels = network.image_shape
    parts = network.parts(11)
    private = torch.rand(60, *channels, generator=drawn).square()
    with torch.no_grad():
        sent = parts.bottom.eval()(private)
    granted: dict[str, Any] = {
        "round_smashed": sent,
        "server_part": network.middle(11).eval().requires_grad_(requires_grad=False),
        "public_images": torch.rand(20, *channels, generator=drawn),
        "natural_images": private[:6],
        "architecture": network,
    }
    return View(
        seat=Seat.SERVER,
        image_shape=channels,
        num_classes=3,
        targets=6,
        device=torch.device("cpu"),
        **(granted | changes),
    )


def _attack(**changes: Any) -> SplitAdversarial:
    return SplitAdversarial(**({"steps": 2, "batch": 8, "ascent": 3, "shadow": "same"} | changes))


def test_both_stages_are_a_slow_literal_reading() -> None:
    # Without BatchNorm: a bias before it has no gradient but rounding, which Adam blows up.
    network = Architecture(
        name="lenet-sigmoid", image_shape=(1, 8, 8), num_classes=3, cut=1, upper_cut=5
    )
    view, seed = _view(network), 5
    attack = _attack(budgets=(0.2,), prior=0.5)
    guess = attack.run(view, seed=seed)

    shadow = network.bottom(derive(seed, "shadow"))
    middle = list(view.server_part.children())  # type: ignore[union-attr]
    adam = torch.optim.Adam(shadow.parameters(), 1e-3)
    draws = BatchSampler(view.public_images, stream=derive(seed, "batches"))  # type: ignore[arg-type]
    for _ in range(2):
        own = shadow(view.public_images[draws.places(8)])  # type: ignore[index]
        theirs = view.round_smashed
        loss = torch.zeros(())
        for place in range(len(middle) + 1):
            if place:
                own, theirs = middle[place - 1](own), middle[place - 1](theirs)
            apart, scale = _gaps(own, theirs)  # type: ignore[arg-type]
            loss = loss + apart / scale
        first, second = (sum(rows.flatten(1)) / len(rows) for rows in (own, theirs))  # type: ignore[arg-type,union-attr]
        loss = loss + 0.5 * (1 - first @ second / (first.norm() * second.norm()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    fitted = attack.fitted(view, seed=seed)
    for own, theirs in zip(shadow.parameters(), fitted.parameters(), strict=True):
        torch.testing.assert_close(own, theirs)
    shadow = fitted  # signs of gradients near 0 tell weights apart that are equal but for rounding

    def features(images: torch.Tensor) -> torch.Tensor:
        for layer in (*shadow, *middle):
            images = layer(images)
        return images.flatten(1)

    natural = view.natural_images
    assert natural is not None
    start = torch.empty(natural.shape).uniform_(
        -0.2, 0.2, generator=generator(derive(seed, "start"))
    )
    moved = (natural + start).clamp(0, 1)
    wanted = features(natural).detach()
    for _ in range(3):
        moved = moved.detach().requires_grad_()
        ((features(moved) - wanted) ** 2).sum(1).mean().backward()
        stepped = moved.detach() + 0.125 * 0.2 * moved.grad.sign()  # type: ignore[union-attr]
        moved = (natural + (stepped - natural).clamp(-0.2, 0.2)).clamp(0, 1)
    assert guess.adversarial is not None
    torch.testing.assert_close(guess.adversarial[:, 0], moved)


def _gaps(own: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return squared gaps of means and spreads, and the squared spreads that were sent."""
    apart, scale = torch.zeros(()), 0.0
    for channel in range(own.shape[1]):
        a, b = own[:, channel].flatten(), theirs[:, channel].flatten()
        mu_a, mu_b = a.sum() / len(a), b.sum() / len(b)
        sd_a = (((a - mu_a) ** 2).sum() / len(a) + 1e-6) ** 0.5
        sd_b = (((b - mu_b) ** 2).sum() / len(b) + 1e-6) ** 0.5
        apart = apart + (mu_a - mu_b) ** 2 + (sd_a - sd_b) ** 2
        scale += float(sd_b**2)
    return apart, scale


def test_kernel_distances_and_a_critic_are_a_slow_literal_reading() -> None:
    network = Architecture(
        name="lenet-sigmoid", image_shape=(1, 8, 8), num_classes=3, cut=1, upper_cut=5
    )
    view, seed = _view(network), 5
    weights = {"moments": 0.0, "critic": 0.3, "mmd": 0.8, "prior": 0.5, "prior_by": "mmd"}
    attack = _attack(critic_rate=1e-2, **weights)
    fitted = attack.fitted(view, seed=seed)

    sent = view.round_smashed
    assert sent is not None
    assert view.server_part is not None
    assert view.public_images is not None
    shadow = network.bottom(derive(seed, "shadow"))
    adam = torch.optim.Adam(shadow.parameters(), 1e-3)
    draws = BatchSampler(view.public_images, stream=derive(seed, "batches"))
    theirs = BatchSampler(sent, stream=derive(seed, "sent"))
    with scoped(derive(seed, "fit")):
        critic = row_critic((12, 4, 4)).train()
        critics = torch.optim.Adam(critic.parameters(), 1e-2, betas=(0.5, 0.999))
        for _ in range(2):
            made = shadow(view.public_images[draws.places(8)])
            rows = sent[theirs.places(8)]
            loss = 0.3 * -torch.sigmoid(critic(made)).log().mean()
            loss = loss + 0.8 * kernel_distance(made, rows)
            above, reached = view.server_part(made), view.server_part(rows)
            loss = loss + 0.5 * kernel_distance(above, reached)
            adam.zero_grad()
            loss.backward()
            adam.step()
            real = -torch.sigmoid(critic(rows)).log().mean()
            shown = -(1 - torch.sigmoid(critic(made.detach()))).log().mean()
            critics.zero_grad()
            (real + shown).backward()
            critics.step()
    for own, wanted in zip(fitted.parameters(), shadow.parameters(), strict=True):
        torch.testing.assert_close(own, wanted)


@pytest.mark.parametrize("weights", [{"mmd": 1.0}, {"prior": 1.0, "prior_by": "mmd"}])
def test_a_kernel_distance_alone_pulls_the_shadow_towards_what_was_sent(
    weights: dict[str, Any],
) -> None:
    view = _view()
    assert view.round_smashed is not None
    assert view.public_images is not None
    assert view.server_part is not None
    attack = _attack(shadow="single", steps=80, rate=1e-2, moments=0.0, **weights)
    part = view.server_part if "prior" in weights else nn.Identity()
    apart = []
    for shadow in (attack.untrained(view, seed=1).eval(), attack.fitted(view, seed=1)):
        with torch.no_grad():
            rows = part(view.round_smashed), part(shadow(view.public_images))
        apart.append(float(kernel_distance(*rows)))
    assert apart[1] < 0.7 * apart[0]


def test_rows_that_are_not_finite_are_left_out_of_what_is_fitted_to() -> None:
    view = _view()
    assert view.round_smashed is not None
    broken = view.round_smashed.clone()
    broken[3, 0, 0, 0] = float("nan")
    guess = _attack().run(replace(view, round_smashed=broken), seed=1)
    assert guess.failed is not None
    assert not guess.failed.any()
    nothing = torch.full_like(broken, float("inf"))
    with pytest.raises(UnfitViewError, match="none of the smashed rows is finite"):
        _attack().run(replace(view, round_smashed=nothing), seed=1)


@pytest.mark.parametrize("shadow", ["single", "multi", "same"])
def test_images_keep_each_budget_and_each_shadow_fits_its_statistics(shadow: str) -> None:
    view = _view()
    attack = _attack(shadow=shadow, steps=60, budgets=(0.2, 0.05), rate=1e-2)
    guess = attack.run(view, seed=1)
    assert guess.adversarial is not None
    assert view.natural_images is not None
    for place, budget in enumerate((0.2, 0.05)):
        refuse_beyond(guess.adversarial[:, place], view.natural_images, budget=budget)
    untrained, fitted = attack.untrained(view, seed=1).eval(), attack.fitted(view, seed=1)
    assert _gap(fitted, view) < 0.5 * _gap(untrained, view)


def _gap(shadow: nn.Module, view: View) -> float:
    """Return how far the mean smashed channels of a shadow lie from those that were sent."""
    with torch.no_grad():
        made = shadow(view.public_images).mean((0, 2, 3))
    assert view.round_smashed is not None
    return float((made - view.round_smashed.mean((0, 2, 3))).square().sum())


@pytest.mark.parametrize(
    ("smashed", "single", "multi"),
    [
        ((64, 32, 32), (3, 1, 1), [(32, 1), (64, 1)]),  # ResNet-18, splits 2 to 4
        ((128, 16, 16), (3, 2, 1), [(32, 1), (64, 1), (128, 2)]),
        ((256, 8, 8), (9, 3, 0), [(32, 1), (64, 1), (128, 2), (256, 2)]),
        ((32, 32, 32), (3, 1, 1), [(32, 1)]),  # MobileNetV2, splits 1 to 3; of 3 the blocks alone
        ((32, 16, 16), (3, 2, 1), [(16, 1), (32, 2)]),
        ((64, 8, 8), None, [(16, 1), (32, 2), (64, 2)]),
        ((24, 32, 32), (3, 1, 1), [(24, 1)]),  # DenseNet, splits 1 to 4
        ((48, 16, 16), (3, 2, 1), [(24, 1), (48, 2)]),
        ((96, 8, 8), (9, 3, 0), [(24, 1), (48, 2), (96, 2)]),
        ((192, 4, 4), (9, 6, 0), [(24, 1), (48, 2), (96, 2), (192, 2)]),
    ],
)
def test_shadows_are_those_that_the_source_tabulates(
    smashed: tuple[int, int, int],
    single: tuple[int, int, int] | None,
    multi: list[tuple[int, int]],
) -> None:
    view = replace(
        _view(),
        image_shape=(3, 32, 32),
        public_images=torch.rand(8, 3, 32, 32),
        round_smashed=torch.zeros(1, *smashed),
    )
    layer = next(
        each
        for each in _attack(shadow="single").untrained(view, seed=0).modules()
        if isinstance(each, nn.Conv2d)
    )
    assert layer.bias is None
    if single is not None:
        assert (layer.kernel_size[0], layer.stride[0], layer.padding[0]) == single
    stack = _attack(shadow="multi").untrained(view, seed=0)
    first = [each.inner[0] for each in stack.children() if isinstance(each, BasicBlock)]
    assert [(each.out_channels, each.stride[0]) for each in first] == multi
    for shadow in ("single", "multi"):
        made = _attack(shadow=shadow).untrained(view, seed=0)(torch.rand(2, 3, 32, 32))
        assert tuple(made.shape[1:]) == smashed


def test_a_shadow_told_the_pairs_comes_nearer_to_the_true_layers() -> None:
    view = _view()
    attack = _attack(steps=150, rate=1e-2)
    images = torch.rand(40, 1, 8, 8, generator=generator(8))
    true = NETWORK.bottom(11).eval()
    with torch.no_grad():
        smashed = true(images)
    told = attack.taught(view, images, smashed, seed=2)
    with torch.no_grad():
        taught = told(images)
        untrained = attack.untrained(view, seed=2).eval()(images)
    assert (taught - smashed).square().mean() < 0.3 * (untrained - smashed).square().mean()


def test_messages_decide_what_is_fitted_and_the_view_is_read_alone() -> None:
    view = _view()
    with torch.no_grad():
        other = NETWORK.bottom(99).eval()(torch.rand(60, 1, 8, 8, generator=generator(1)))
    one, two = (
        _attack().run(each, seed=1).adversarial
        for each in (view, replace(view, round_smashed=other))
    )
    assert one is not None
    assert two is not None
    assert not torch.equal(one, two)


def test_smashed_data_that_are_no_maps_have_a_shadow() -> None:
    network = Architecture(
        name="mnistnet", image_shape=(1, 16, 16), num_classes=3, cut=6, upper_cut=9
    )
    for shadow in ("single", "multi"):
        guess = _attack(shadow=shadow).run(_view(network), seed=0)
        assert guess.adversarial is not None
        assert guess.adversarial.isfinite().all()


def test_the_layer_of_the_distance_counts() -> None:
    view = _view()
    first, last = (_attack(layer=layer).run(view, seed=1).adversarial for layer in (0, -1))
    assert not torch.equal(first, last)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budgets": (0.0,)}, "above 0 and at most 1"),
        ({"budgets": (-0.2,)}, "above 0 and at most 1"),
        ({"budgets": (1.2,)}, "above 0 and at most 1"),
        ({"mean": (0.5,)}, "one std above 0 per channel"),
    ],
)
def test_budgets_and_normalisations_that_are_none_are_refused(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(BudgetError, match=says):
        _attack(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budgets": ()}, "name one or more"),
        ({"shadow": "double"}, "single, multi, same"),
        ({"distance": "l1"}, "l2, cosine"),
        ({"steps": -1}, "0 or more"),
        ({"ascent": 0}, "1 or more"),
        ({"rate": 0.0}, "above 0"),
        ({"critic_rate": 0.0}, "above 0"),
        ({"moments": 0.0}, "needs one above it"),
        ({"mmd": -0.1}, "none may be below 0"),
        ({"critic": float("nan")}, "none may be below 0"),
        ({"prior_by": "l2"}, "mmd, cosine"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        _attack(**changes)


@pytest.mark.parametrize(
    ("attack", "view", "says"),
    [
        ({"batch": 21}, {}, "20 public images cannot fill a batch of 21"),
        ({"layer": 4}, {}, "its part has 4 layers, so use 0 to 3"),
        ({"layer": -5}, {}, "layer -5 is none of the server's"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, {}, "of 2 channels, the images have 1"),
        ({}, {"public_images": torch.rand(20, 3, 8, 8)}, "resize them, or choose another"),
    ],
)
def test_what_does_not_fit_is_refused_from_the_view_before_the_first_message(
    attack: dict[str, Any], view: dict[str, Any], says: str
) -> None:
    opening = replace(_view(**view), round_smashed=None, smashed_shape=(32, 8, 8))
    with pytest.raises(UnfitViewError, match=says):
        _attack(**attack).check(opening)


def test_without_its_knowledge_it_says_what_it_needs() -> None:
    for name in ("server_part", "public_images", "natural_images", "round_smashed"):
        with pytest.raises(MissingKnowledgeError):
            _attack().run(replace(_view(), **{name: None}), seed=0)
    with pytest.raises(MissingKnowledgeError, match="needs the architecture"):
        _attack().run(replace(_view(), architecture=None), seed=0)


def test_a_normalising_shadow_keeps_its_budget_in_pixels() -> None:
    view = _view()
    with scoped(0):
        guess = _attack(mean=(0.3,), std=(0.2,)).run(view, seed=0)
    assert guess.adversarial is not None
    assert view.natural_images is not None
    refuse_beyond(guess.adversarial[:, 0], view.natural_images, budget=0.2)
