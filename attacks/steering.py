"""Steering: what hijackers share, whatever they read of a client that follows them.

Each trains a pilot on its own images, with an inverse that reads the pilot's feature maps, and a
critic that tells the client's maps from the pilot's. The client gets the critic's gradient.

Source: Pasquini, Ateniese, Bernaschi, *Unleashing the Tiger: Inference Attacks on Split Learning*,
CCS 2021, https://arxiv.org/abs/2012.02670, and its code,
https://github.com/pasquini-dario/SplitNN_FSHA.

Departures:
- The pilot ends in a ReLU where the first smashed batch has no negative number (``output``): the
  published client ends in a sum, but a pilot that may go below zero is easily told from a ReLU.
- Published clients and pilots read pixels in [-1, 1]. Clients here read [0, 1]; so may the pilot.
- Public images are drawn without replacement until too few are left for a batch.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from attacks.critic import PENALTIES, Critic, Penalty
from attacks.hijacking_networks import (
    ACTIVATIONS,
    NETS,
    PADDINGS,
    Blueprint,
    NoPilotError,
    blueprint,
)
from attacks.owned_images import Draws
from leakbed.contracts import MissingKnowledgeError, UnfitViewError, View
from leakbed.naming import unknown
from leakbed.seeds import derive

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
    """

    pilot: nn.Module
    critic: Critic
    draws: Draws
    unit: bool
    rectified: bool | None

    def mapped(
        self, images: Float[Tensor, " batch *image"]
    ) -> Float[Tensor, " batch channels height width"]:
        """Return the pilot's feature maps of images in [-1, 1]."""
        maps: Tensor = self.pilot(images.add(1).div(2) if self.unit else images)
        return maps.relu() if self.rectified else maps

    def received(
        self, smashed: Float[Tensor, " batch channels height width"]
    ) -> Float[Tensor, " batch channels height width"]:
        """Return a smashed batch of training as the critic reads it; the first ends the pilot."""
        private = self.draws.like(smashed)
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
        pixels: The pilot reads: ``"centred"`` in [-1, 1], ``"unit"`` in [0, 1]. With the latter a
            small decoder starts at the public images' mean grey; for clients without BatchNorm.
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
                raise ValueError(unknown(setting, value, legal))
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
            draws=Draws(images, stream=derive(seed, "public")),
            unit=self.pixels == "unit",
            rectified={"linear": False, "relu": True}.get(self.output),
        )
