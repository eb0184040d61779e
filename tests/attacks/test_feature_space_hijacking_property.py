"""Property inference: the published step, literally; and what it takes a hijack to read."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.feature_space_hijacking import SMALL
from attacks.feature_space_hijacking_property import FeatureSpaceHijackingProperty, Telling
from leakbed.contracts import MissingKnowledgeError, Seat, UnfitViewError, View
from leakbed.seeds import derive, generator, scoped
from tests.support.hijackable import plain_adam, published_critic

SHAPE, SMASHED, ROWS = (1, 12, 12), (6, 6, 6), 8
ANSWERS = torch.zeros(ROWS, *SMASHED)


def shown(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A bright spot on dark (0), a bright bar (1), or a dark spot on bright (2), anywhere."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.arange(count) % 3
    images = torch.where(values == 2, 0.9, 0.1).reshape(-1, 1, 1, 1).repeat(1, *SHAPE)
    for image, value in zip(images, values, strict=True):
        y, x = torch.randint(10, (2,), generator=draw).tolist()
        image[0, y : y + 3, slice(0, 12) if value == 1 else slice(x, x + 3)] = 1 - image[0, y, x]
    return images, values


def view(*, values: int = 3, **changes: Any) -> View:
    images, told = shown(90, seed=1)
    kept = told < values
    known: dict[str, Any] = {
        "seat": Seat.SERVER,
        "image_shape": SHAPE,
        "num_classes": 2,
        "targets": 0,
        "rows": ROWS,
        "public_images": images[kept],
        "public_attributes": told[kept],
        "attribute_values": values,
        "smashed_shape": SMASHED,
        "device": torch.device("cpu"),
    }
    return View(**known | changes)


def client() -> nn.Sequential:
    with scoped(11):
        return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.MaxPool2d(2))


def adversary(**changes: Any) -> FeatureSpaceHijackingProperty:
    return FeatureSpaceHijackingProperty(**SMALL | changes)


def begun(*, values: int = 3, **changes: Any) -> tuple[FeatureSpaceHijackingProperty, Telling]:
    chosen = adversary(**changes)
    return chosen, chosen.begin(view(values=values), seed=5)


def test_the_published_settings_are_the_defaults() -> None:
    paper = FeatureSpaceHijackingProperty()
    assert (paper.pilot_rate, paper.critic_rate, paper.critic_beta) == (1e-5, 1e-4, 0.9)
    assert (paper.penalty, paper.penalty_weight) == ("channel", 500.0)
    assert (paper.nets, paper.activations, paper.norm) == ("paper", "linear", "auto")
    assert FeatureSpaceHijackingProperty(attribute="parity").threat.in_words() == (
        "The server rewrites messages, reads the activations a node sends at the cut, infers the "
        "attribute 'parity', and knows that attribute of each image of its own, images of its own."
    )


@pytest.mark.parametrize("values", [2, 3])
def test_five_steps_are_the_published_ones(values: int) -> None:
    """All losses of one forward pass; then the client's gradient, pilot and head, critic."""
    # Rounding is all the gradient that flat images and biases under a norm have; Adam enlarges it.
    chosen = adversary(output="linear", activations="swish", norm="none")
    noise = torch.rand(90, *SHAPE, generator=torch.Generator().manual_seed(0))
    told = torch.arange(90) % values
    state = chosen.begin(view(values=values, public_images=noise, public_attributes=told), seed=5)
    pilot, head, critic = map(copy.deepcopy, (state.pilot, state.head, state.critic.network))
    pair_adam = plain_adam([pilot, head], chosen.pilot_rate)
    critic_adam = plain_adam([critic], chosen.critic_rate, betas=(chosen.critic_beta, 0.999))
    mixing, draws = generator(derive(5, "mixing")), copy.deepcopy(state.draws)
    for step in range(5):
        sent = torch.randn(ROWS, *SMASHED, generator=torch.Generator().manual_seed(step))
        state, forged = chosen.forge(state, sent, ANSWERS)

        places = draws.places(ROWS)
        wanted = told[places]
        maps = pilot(noise[places] * 2 - 1)
        logits = head(maps)
        if values == 2:
            chance = logits[:, 0].sigmoid()
            loss = -(wanted * chance.log() + (1 - wanted) * (1 - chance).log()).mean()
        else:
            loss = -logits.log_softmax(1)[torch.arange(ROWS), wanted].mean()
        expected, critic_loss = published_critic(
            critic,
            sent,
            maps,
            mixing=mixing,
            penalty_weight=chosen.penalty_weight,
            axes=(1, 2, 3),
        )
        pair_adam.zero_grad()
        loss.backward()
        pair_adam.step()
        critic_adam.zero_grad()
        critic_loss.backward()
        critic_adam.step()

        assert torch.allclose(forged, expected, rtol=1e-3, atol=1e-6)
        assert torch.allclose(state.loss, loss, rtol=1e-3)
        assert torch.allclose(state.critic.loss, critic_loss, rtol=1e-3)


@pytest.mark.parametrize("values", [2, 3])
def test_the_head_reads_who_looks_like_the_pilot(values: int) -> None:
    """Images it never saw, off the pilot's maps; off an untouched client's it reads nothing."""
    images, told = shown(90, seed=2)
    kept = told < values
    chosen, state = begun(values=values, output="relu", norm="none")
    for _ in range(70):
        state, _ = chosen.forge(state, ANSWERS, ANSWERS)
    found = []
    with torch.no_grad():
        for maps in (state.mapped(images[kept] * 2 - 1), client()(images[kept])):
            guessed = chosen.guess(state, maps).attributes
            assert guessed is not None
            found.append(float((guessed[:, 0] == told[kept]).float().mean()))
    assert found[0] > 0.85
    assert found[1] < 0.7


@pytest.mark.parametrize(
    ("values", "norm", "layers", "outputs"),
    [(2, "auto", 2, 1), (2, "batch", 3, 1), (3, "auto", 3, 3), (3, "none", 2, 3)],
)
def test_the_head_is_one_linear_layer_normalised_where_it_is_to_be(
    values: int, norm: str, layers: int, outputs: int
) -> None:
    _, state = begun(values=values, norm=norm)
    assert isinstance(state.head, nn.Sequential)
    assert len(state.head) == layers
    assert state.head[-1].out_features == outputs


def test_a_guess_is_a_value_per_row_and_counts_no_batch() -> None:
    chosen, state = begun()
    sent = torch.randn(ROWS, *SMASHED, generator=torch.Generator().manual_seed(0))
    state, _ = chosen.forge(state, sent, ANSWERS)
    kept = copy.deepcopy(state.head.state_dict())
    sent[3, 0, 0, 0] = torch.nan
    guess = chosen.guess(state, sent)
    assert guess.attributes is not None
    assert guess.failed is not None
    assert guess.attributes.shape == (ROWS, 1)
    assert set(guess.attributes.flatten().tolist()) <= {0, 1, 2}
    assert guess.failed.nonzero().tolist() == [[3]]
    assert all(torch.equal(kept[name], each) for name, each in state.head.state_dict().items())
    one = chosen.guess(state, sent[:1]).attributes
    assert one is not None
    assert torch.equal(one, guess.attributes[:1])  # by what training counted, not by its batch


def test_the_head_s_statistics_count_both_kinds_of_batches_as_published() -> None:
    """Per step the private batch, then the public one, by Keras's momentum of 0.99."""
    chosen, state = begun()
    images, _ = shown(90, seed=1)
    sent = torch.randn(ROWS, *SMASHED, generator=torch.Generator().manual_seed(0))
    places = copy.deepcopy(state.draws).places(ROWS)
    state.rectified = False
    with torch.no_grad():
        public = state.mapped(images[places] * 2 - 1).flatten(1)
    state, _ = chosen.forge(state, sent, ANSWERS)
    assert isinstance(state.head, nn.Sequential)
    mean = 0.99 * 0.01 * sent.flatten(1).mean(0) + 0.01 * public.mean(0)
    torch.testing.assert_close(state.head[1].running_mean, mean)
    assert state.head[1].num_batches_tracked == 2
    assert not state.head.training


def test_each_image_keeps_its_attribute() -> None:
    images, told = shown(90, seed=1)
    chosen, state = begun()
    assert torch.equal(state.attributes, told)
    places = copy.deepcopy(state.draws).places(ROWS)
    with torch.no_grad():
        logits = copy.deepcopy(state.head).train()(state.mapped(images[places] * 2 - 1))
    state, _ = chosen.forge(state, ANSWERS - 1, ANSWERS)
    expected = nn.functional.cross_entropy(logits, told[places])
    assert torch.allclose(state.loss, expected, rtol=1e-4)


def test_the_forged_gradient_can_be_scaled_and_has_the_clients_type() -> None:
    sent, forged = torch.ones(ROWS, *SMASHED, dtype=torch.float64), []
    for scale in (1.0, 25.0):
        chosen, state = begun(gradient_scale=scale)
        forged.append(chosen.forge(state, sent, sent)[1])
    assert torch.allclose(25 * forged[0], forged[1])
    assert forged[0].any()
    assert forged[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": 91}, UnfitViewError, "90 public images .* has 91"),
        ({"public_images": None}, MissingKnowledgeError, "public share"),
        ({"public_attributes": None}, MissingKnowledgeError, "set public_attributes"),
        ({"attribute_values": None}, MissingKnowledgeError, "set public_attributes"),
        ({"smashed_shape": None}, MissingKnowledgeError, "fsha-property builds its networks"),
        ({"smashed_shape": (32,)}, UnfitViewError, "fsha-property: .* which no pilot makes"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        adversary().begin(view(**changes), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attribute": "pairty"}, "did you mean 'parity'"),
        ({"norm": "layer"}, "unknown norm"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureSpaceHijackingProperty(**settings)
