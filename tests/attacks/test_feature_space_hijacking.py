import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.feature_space_hijacking import SMALL, FeatureSpaceHijacking, Hijacked
from leakbed.contracts import Knowledge, MissingKnowledgeError, Seat, UnfitViewError, View
from leakbed.distance_correlation import corrected_correlation
from leakbed.hijack import Hijack, rehearse
from leakbed.seeds import derive, generator, scoped
from tests.support.hijackable import plain_adam, published_critic

SHAPE, SMASHED, ROWS = (1, 12, 12), (6, 6, 6), 8


def images(count: int, seed: int) -> Tensor:
    """A bright bar on black, across at any height or down at any place."""
    draw = torch.Generator().manual_seed(seed)
    made = torch.zeros(count, *SHAPE)
    for image in made:
        at = int(torch.randint(10, (), generator=draw))
        across = bool(torch.randint(2, (), generator=draw))
        image[0, slice(at, at + 3) if across else slice(0, 12)] = 0.1
        (image[0] if across else image[0].T)[at : at + 3] = 0.9
    return made


def view(**changes: Any) -> View:
    known: dict[str, Any] = {
        "seat": Seat.SERVER,
        "image_shape": SHAPE,
        "num_classes": 2,
        "targets": 0,
        "rows": ROWS,
        "public_images": images(40, seed=1),
        "public_labels": torch.arange(40) % 2,
        "smashed_shape": SMASHED,
        "device": torch.device("cpu"),
    }
    return View(**known | changes)


def client() -> nn.Sequential:
    with scoped(11):
        return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.MaxPool2d(2))


def adversary(**changes: Any) -> FeatureSpaceHijacking:
    return FeatureSpaceHijacking(**SMALL | changes)


def begun(**changes: Any) -> tuple[FeatureSpaceHijacking, Hijacked]:
    chosen = adversary(**changes)
    return chosen, chosen.begin(view(), seed=5)


def test_the_published_settings_are_the_defaults() -> None:
    paper = FeatureSpaceHijacking()
    assert (paper.pilot_rate, paper.critic_rate, paper.critic_beta) == (1e-5, 1e-4, 0.9)
    assert (paper.penalty, paper.penalty_weight) == ("channel", 500.0)
    assert (paper.nets, paper.activations) == ("paper", "linear")
    assert paper.threat.active
    assert paper.threat.in_words() == (
        "The server rewrites messages, reads the activations a node sends at the cut, and knows "
        "images of its own."
    )
    without = FeatureSpaceHijacking(without_class=0).threat
    assert without.needs == {Knowledge.PUBLIC_IMAGES, Knowledge.PUBLIC_LABELS}


@pytest.mark.parametrize(("penalty", "pixels"), [("channel", "centred"), ("sample", "unit")])
def test_five_steps_are_the_published_ones(penalty: str, pixels: str) -> None:
    """All losses of one forward pass; then the client's gradient, pilot and decoder, critic."""
    chosen, state = begun(penalty=penalty, pixels=pixels, output="linear", activations="swish")
    pilot, decoder, critic = map(copy.deepcopy, (state.pilot, state.decoder, state.critic.network))
    pair_adam = plain_adam([pilot, decoder], chosen.pilot_rate)
    critic_adam = plain_adam([critic], chosen.critic_rate, betas=(chosen.critic_beta, 0.999))
    mixing = generator(derive(5, "mixing"))
    draws = copy.deepcopy(state.draws)
    for step in range(5):
        sent = torch.randn(ROWS, *SMASHED, generator=torch.Generator().manual_seed(step))
        state, forged = chosen.forge(state, sent, torch.zeros_like(sent))

        public = draws.batch(ROWS)
        maps = pilot(public if pixels == "centred" else (public + 1) / 2)
        reconstruction = ((decoder(maps) - public) ** 2).mean()
        expected, critic_loss = published_critic(
            critic,
            sent,
            maps,
            mixing=mixing,
            penalty_weight=chosen.penalty_weight,
            axes=(2, 3) if penalty == "channel" else (1, 2, 3),
        )
        pair_adam.zero_grad()
        reconstruction.backward()
        pair_adam.step()
        critic_adam.zero_grad()
        critic_loss.backward()
        critic_adam.step()

        assert torch.allclose(forged, expected, rtol=1e-3, atol=1e-6)
        assert torch.allclose(state.autoencoder_loss, reconstruction, rtol=1e-4)
        assert torch.allclose(state.critic.loss, critic_loss, rtol=1e-3)


def test_its_losses_fall_and_only_a_hijacked_client_is_decoded() -> None:
    """The decoder's error falls, the critic's gap closes, and it takes the hijack to decode."""
    private, untouched = images(60, seed=2), client()
    draw = torch.Generator().manual_seed(3)
    losses: list[tuple[float, float]] = []

    def watch(step: int, bottom: nn.Module, hijack: Hijack[Hijacked]) -> None:
        state = hijack.state
        losses.append((float(state.autoencoder_loss), abs(float(state.critic.loss))))

    done = rehearse(
        untouched,
        adversary(),
        (private[torch.randperm(60, generator=draw)[:ROWS]] for _ in range(400)),
        view=view(),
        seed=5,
        optimiser=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        watch=watch,
    )
    with torch.no_grad():
        hijacked, honest = (
            done.hijack.guess(bottom(private)).images for bottom in (done.bottom, untouched)
        )
    assert losses[-1][0] < 0.05 * losses[0][0]
    gaps = torch.tensor([gap for _, gap in losses]).reshape(10, -1).mean(1)  # batches are few rows
    assert gaps[-1] < 0.8 * gaps.max()
    assert hijacked is not None
    assert honest is not None
    errors = [float((each[:, 0] - private).square().mean()) for each in (hijacked, honest)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("mask_dead_channels", [True, False])
def test_the_pilot_does_without_a_clients_dead_channels_where_it_is_told_to(
    mask_dead_channels: bool,
) -> None:
    sent = torch.rand(ROWS, *SMASHED, generator=torch.Generator().manual_seed(0))
    sent[:, 2:4] = 0.0
    chosen, state = begun(mask_dead_channels=mask_dead_channels)
    before = copy.deepcopy(state.pilot[-1].bias)
    for _ in range(2):
        state, _ = chosen.forge(state, sent, sent)
    public = state.mapped(images(40, seed=1).mul(2).sub(1))
    assert bool(public[:, 2:4].any()) is not mask_dead_channels
    assert public[:, :2].any()
    assert (
        torch.equal(state.pilot[-1].bias[2:4], before[2:4]) is mask_dead_channels
    )  # nor learns in them


@pytest.mark.parametrize("pixels", ["centred", "unit"])
def test_a_small_decoder_starts_at_the_grey_of_its_own_images(pixels: str) -> None:
    """From middle grey its first steps would darken all, and drag the pilot's maps with them."""
    _, state = begun(pixels=pixels)
    made = state.decoder(torch.zeros(1, *SMASHED)).add(1).div(2)
    assert torch.allclose(made, images(40, seed=1).mean(), atol=1e-3)


def test_the_forged_gradient_can_be_scaled() -> None:
    sent = torch.ones(ROWS, *SMASHED)
    forged = []
    for scale in (1.0, 25.0):
        chosen, state = begun(gradient_scale=scale)
        forged.append(chosen.forge(state, sent, sent)[1])
    assert torch.allclose(25 * forged[0], forged[1])
    assert forged[0].any()


@pytest.mark.parametrize(
    ("output", "value", "rectified"),
    [("auto", 0.0, True), ("auto", -0.1, False), ("linear", 1.0, False), ("relu", -1.0, True)],
)
def test_the_first_batch_says_what_ends_the_pilot(
    output: str, value: float, rectified: bool
) -> None:
    chosen, state = begun(output=output)
    sent = torch.full((ROWS, *SMASHED), value)
    state, _ = chosen.forge(state, sent, sent)
    assert state.rectified is rectified
    assert bool((state.mapped(images(ROWS, seed=1)) >= 0).all()) is rectified
    state, _ = chosen.forge(state, -sent - 1, sent)
    assert state.rectified is rectified


def test_a_target_space_of_low_correlation_is_prepared_once_and_kept() -> None:
    """The joint loss beside reconstruction alone: less correlation, and pictures all the same."""
    own, correlations = images(40, seed=1).mul(2).sub(1), []
    for fidelity in (1.0, 1e4):  # against the correlation, whose weight is 1
        chosen, state = begun(pretraining=100, fidelity=fidelity)
        sent = torch.rand(20, *SMASHED, generator=torch.Generator().manual_seed(0))
        state, _ = chosen.forge(state, sent, sent)
        assert state.autoencoder_loss < 0.3
        with torch.no_grad():
            maps = state.mapped(own)
        correlations.append(float(corrected_correlation(own, maps)))
        kept = copy.deepcopy(state.pilot.state_dict())
        state, forged = chosen.forge(state, sent, sent)
        assert forged.any()
        assert all(torch.equal(kept[k], v) for k, v in state.pilot.state_dict().items())
    assert correlations[0] < correlations[1] - 0.05


def test_a_guess_is_an_image_per_row_and_says_where_it_failed() -> None:
    chosen, state = begun()
    sent = torch.randn(300, *SMASHED, generator=torch.Generator().manual_seed(0))
    sent[7, 0, 0, 0] = torch.nan
    guess = chosen.guess(state, sent)
    assert guess.images is not None
    assert guess.failed is not None
    assert guess.images.shape == (300, 1, *SHAPE)
    assert guess.failed.nonzero().tolist() == [[7]]
    sound = guess.images[~guess.failed]
    assert sound.min() >= 0
    assert sound.max() <= 1


def test_a_smaller_last_batch_is_answered_too() -> None:
    chosen, state = begun()
    for rows in (ROWS, 3):
        sent = torch.ones(rows, *SMASHED)
        state, forged = chosen.forge(state, sent, sent)
        assert forged.shape == sent.shape


def test_a_client_in_float64_gets_its_gradient_in_float64() -> None:
    chosen, state = begun()
    sent = torch.ones(ROWS, *SMASHED, dtype=torch.float64)
    _, forged = chosen.forge(state, sent, sent)
    assert forged.dtype == torch.float64
    images_ = chosen.guess(state, sent).images
    assert images_ is not None
    assert images_.dtype == torch.float64


def test_a_class_is_left_out_of_its_images() -> None:
    _, state = begun(without_class=1)
    assert torch.equal(state.draws.images, images(40, seed=1)[::2])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": 41}, UnfitViewError, "40 public images .* has 41"),
        ({"image_shape": (1, 14, 14)}, UnfitViewError, "resize them"),
        ({"public_images": 255 * images(40, seed=1)}, UnfitViewError, "scale them"),
        ({"public_images": None}, MissingKnowledgeError, "public share"),
        ({"smashed_shape": None}, MissingKnowledgeError, "smashed_shape"),
        ({"smashed_shape": (32,)}, UnfitViewError, "padded: 12x12, 6x6, 3x3, 2x2, 1x1; unpadded"),
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
        ({"nets": "papre"}, "did you mean 'paper'"),
        ({"pretraining": -1}, "pretraining is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureSpaceHijacking(**settings)
