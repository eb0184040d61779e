"""Feature-space hijacking: the training of pilot, inverse and critic that its attacks share.

Each attack trains a pilot on its own images, with an inverse that reads the pilot's feature maps,
and a critic that tells the client's maps from the pilot's. The client gets the critic's gradient.

Source: Pasquini, Ateniese, Bernaschi, *Unleashing the Tiger: Inference Attacks on Split Learning*,
CCS 2021, https://arxiv.org/abs/2012.02670, and its code,
https://github.com/pasquini-dario/SplitNN_FSHA.

Departures:
- The pilot ends in a ReLU where the first smashed batch has no negative number (``output``): the
  published client ends in a sum, but a pilot that may go below zero is easily told from a ReLU.
- Published clients and pilots read pixels in [-1, 1]. Clients here read [0, 1]; so may the pilot.
- Channels that a client no longer uses can be left out of the pilot's maps
  (``mask_dead_channels``).
- Public images are drawn without replacement until too few are left for a batch.

**The critic** has a Wasserstein loss with gradient penalty. It learns to score the pilot's feature
maps low and the client's high; the gradient of its score, with respect to what the client sent, is
what the client gets to descend on.

Source: Pasquini, Ateniese, Bernaschi, *Unleashing the Tiger: Inference Attacks on Split Learning*,
CCS 2021, https://arxiv.org/abs/2012.02670, and its code (whose signs these are),
https://github.com/pasquini-dario/SplitNN_FSHA; the penalty after Gulrajani, Ahmed, Arjovsky,
Dumoulin, Courville, *Improved Training of Wasserstein GANs*, NeurIPS 2017,
https://arxiv.org/abs/1704.00028.

Departure: the norm has a floor of 1e-6, where its gradient would not be a number.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Adam

from attacks.building_blocks.gan_networks import (
    ACTIVATIONS,
    NETS,
    PADDINGS,
    Blueprint,
    NoPilotError,
    blueprint,
)
from attacks.building_blocks.public_images import BatchSampler
from leakbed.contracts import MissingKnowledgeError, UnfitViewError, View
from leakbed.lookup import unknown_name
from leakbed.seeds import derive, generator
from leakbed.tensors import placed

PENALTIES = ("channel", "sample")
EPSILON = 1e-7
"""Keras's, in Adam."""

_FLOOR = 1e-12  # of a squared norm
_AHEAD = 100  # batches


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """What keeps the critic's slope near 1.

    Attributes:
        over: The norm is taken of each ``"channel"`` of each sample (the published code: a total
            norm of the root of the number of channels), or over each ``"sample"`` (the usual one).
        weight: In the critic's loss.
    """

    over: str
    weight: float

    def __call__(
        self, network: nn.Module, between: Float[Tensor, " batch channels height width"]
    ) -> Float[Tensor, ""]:
        """Return the weighted penalty at some points."""
        points = between.detach().requires_grad_()
        (slope,) = torch.autograd.grad(network(points).sum(), points, create_graph=True)
        axes = (2, 3) if self.over == "channel" else (1, 2, 3)
        norm = slope.square().sum(axes).clamp(min=_FLOOR).sqrt()
        return (norm - 1).square().mean() * self.weight


class Shares:
    """Numbers in [0, 1), drawn on the CPU for a hundred batches at once: a GPU waits once for all.

    The numbers are those of a draw for each batch, bit for bit.
    """

    def __init__(self, *, stream: int) -> None:
        """Draw nothing yet."""
        self._draw = generator(stream)
        self._left = torch.empty(0)

    def next(self, rows: int, *, device: torch.device) -> Float[Tensor, " rows"]:
        """Return the next numbers, one a row."""
        if len(self._left) < rows:
            more = torch.rand(_AHEAD * rows, generator=self._draw)
            self._left = torch.cat([self._left.to(device), placed(more, device)])
        taken, self._left = self._left[:rows], self._left[rows:]
        return taken


class Critic:
    """A critic in training; stepped in place.

    Attributes:
        network: Gives each row of feature maps a score.
        loss: Of its last step, before it and with the penalty; NaN before the first.
        client_loss: What the client descends on: the mean score of its last batch, likewise.
    """

    def __init__(
        self, network: nn.Module, *, rate: float, beta: float, penalty: Penalty, stream: int
    ) -> None:
        """Take the network.

        Args:
            network: With fresh weights.
            rate: Adam's step size.
            beta: Its first momentum.
            penalty: On the slope between both kinds of feature maps.
            stream: Draws the points between them.
        """
        self.network = network
        self._adam = Adam(
            network.parameters(), lr=rate, betas=(beta, 0.999), eps=EPSILON, fused=True
        )
        self._penalty, self._shares = penalty, Shares(stream=stream)
        self.loss: Float[Tensor, ""] = torch.tensor(torch.nan)
        self.client_loss: Float[Tensor, ""] = torch.tensor(torch.nan)

    def answer(
        self,
        private: Float[Tensor, " batch channels height width"],
        public: Float[Tensor, " batch channels height width"],
    ) -> Float[Tensor, " batch channels height width"]:
        """Return the gradient of the client's loss, and train the critic one step.

        Args:
            private: What the client sent.
            public: What the pilot made.

        Returns:
            By the weights before the step, in memory of its own.
        """
        sent = private.detach().requires_grad_()
        made = public.detach()
        share = self._shares.next(len(sent), device=made.device).to(made)[:, None, None, None]
        client_loss = self.network(sent).mean()
        loss = self.network(made).mean() - client_loss
        loss = loss + self._penalty(self.network, share * private + (1 - share) * made)
        # One backward pass gives both gradients: the penalty is at points cut off from `sent`, so
        # the gradient there is minus that of the client's loss. (`backward`, not `autograd.grad`:
        # only it lays the weights' gradients out as the fused step reads them.)
        self._adam.zero_grad()
        loss.backward()
        forged = torch.zeros_like(sent) if sent.grad is None else -sent.grad
        self._adam.step()
        self.loss, self.client_loss = loss.detach(), client_loss.detach()
        return forged


OUTPUTS = ("auto", "linear", "relu")
PIXELS = ("centred", "unit")


@dataclass(kw_only=True, eq=False)
class Steering:
    """What every hijacker holds; changed in place as it forges.

    Attributes:
        pilot: From images to feature maps, without the ReLU that may end it.
        critic: Tells the client's feature maps from the pilot's.
        draws: Its own images.
        unit: Whether the pilot reads pixels in [0, 1].
        rectified: Whether a ReLU ends the pilot; None until the first smashed batch.
        active_channels: The channels that the last smashed batch used; None where all count.
        mask_dead_channels: Whether that is looked at.
    """

    pilot: nn.Module
    critic: Critic
    draws: BatchSampler
    unit: bool
    rectified: bool | None
    active_channels: Bool[Tensor, " channels 1 1"] | None = None
    mask_dead_channels: bool = False

    def mapped(
        self, images: Float[Tensor, " batch *image"]
    ) -> Float[Tensor, " batch channels height width"]:
        """Return the pilot's feature maps of images in [-1, 1]."""
        maps: Tensor = self.pilot(images.add(1).div(2) if self.unit else images)
        ended = maps.relu() if self.rectified else maps
        return ended if self.active_channels is None else ended * self.active_channels

    def received(
        self, smashed: Float[Tensor, " batch channels height width"]
    ) -> Float[Tensor, " batch channels height width"]:
        """Return a smashed batch of training as the critic reads it; the first ends the pilot."""
        private = self.draws.like(smashed)
        if self.mask_dead_channels:
            self.active_channels = private.ne(0).any(0).any(-1, keepdim=True).any(-2, keepdim=True)
        if self.rectified is None:
            self.rectified = bool((private >= 0).all())
        return private


@dataclass(frozen=True, kw_only=True)
class HijackSettings:
    """The settings of every hijacker; published ones are the defaults.

    Attributes:
        nets: ``"paper"``, or ``"small"`` for a CPU.
        activations: Of pilot and inverse: ``"linear"`` (the code: none) or ``"swish"`` (the paper).
        padding: Whether the pilot's halvings pad; ``"auto"`` takes the shallowest pilot that fits.
        output: What ends the pilot: ``"linear"``, ``"relu"``, or ``"auto"`` by what the client
            sends.
        mask_dead_channels: Whether the pilot's maps are zero in the channels where the last
            smashed batch was. Nothing learns below a dead ReLU, so the critic would tell the two
            kinds of maps apart by such a channel for good, and the client would get no gradient
            worth following in the others.
        pixels: The pilot reads: ``"centred"`` in [-1, 1], ``"unit"`` in [0, 1].
        pilot_rate: Adam's step size on pilot and inverse.
        critic_rate: On the critic.
        critic_beta: Adam's first momentum on the critic.
        penalty: The critic's gradient is to have norm 1 in each ``"channel"`` of its input (the
            code), or over each ``"sample"`` (the usual penalty).
        penalty_weight: Of the penalty.
        gradient_scale: Factor of the forged gradient; the paper's answer to a client that adds a
            distance-correlation penalty to its loss is 25.
    """

    nets: str = "paper"
    activations: str = "linear"
    padding: str = "auto"
    output: str = "auto"
    mask_dead_channels: bool = False
    pixels: str = "centred"
    pilot_rate: float = 1e-5
    critic_rate: float = 1e-4
    critic_beta: float = 0.9
    penalty: str = "channel"
    penalty_weight: float = 500.0
    gradient_scale: float = 1.0

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        for setting, legal in (
            ("nets", NETS),
            ("activations", ACTIVATIONS),
            ("padding", PADDINGS),
            ("output", OUTPUTS),
            ("pixels", PIXELS),
            ("penalty", PENALTIES),
        ):
            if (value := getattr(self, setting)) not in legal:
                raise ValueError(unknown_name(setting, value, legal))
        for setting in ("pilot_rate", "critic_rate", "gradient_scale"):
            if not getattr(self, setting) > 0:
                raise ValueError(f"{setting} is {getattr(self, setting)}; it must be positive")

    def plan(self, view: View) -> Blueprint:
        """Return the plan of the networks for what a view says will be sent.

        Args:
            view: With ``image_shape`` and ``smashed_shape``.

        Returns:
            The plan.

        Raises:
            MissingKnowledgeError: If the view says no shape.
            UnfitViewError: If no pilot makes feature maps of that shape.
        """
        if view.smashed_shape is None:
            raise MissingKnowledgeError(
                f"{self.name} builds its networks for one shape of smashed data, and the view says "
                "none; set smashed_shape"
            )
        try:
            return blueprint(
                view.image_shape,
                view.smashed_shape,
                nets=self.nets,
                activations=self.activations,
                padding=self.padding,
            )
        except NoPilotError as error:
            raise UnfitViewError(f"{self.name}: {error}") from error

    def steering(
        self, plan: Blueprint, images: Float[Tensor, " public *image"], *, seed: int
    ) -> Steering:
        """Return pilot, critic and draws before the first batch.

        Args:
            plan: From :meth:`plan`.
            images: The hijacker's own, on the device where it computes.
            seed: Draws the weights, the public batches and the penalty's points.

        Returns:
            The state that hijackers share.
        """
        critic = Critic(
            plan.critic(derive(seed, "critic")).to(images.device),
            rate=self.critic_rate,
            beta=self.critic_beta,
            penalty=Penalty(over=self.penalty, weight=self.penalty_weight),
            stream=derive(seed, "mixing"),
        )
        return Steering(
            pilot=plan.pilot(derive(seed, "pilot")).to(images.device),
            critic=critic,
            draws=BatchSampler(images, stream=derive(seed, "public")),
            unit=self.pixels == "unit",
            rectified={"linear": False, "relu": True}.get(self.output),
            mask_dead_channels=self.mask_dead_channels,
        )
