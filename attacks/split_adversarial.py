"""SPADV-style: a U-shape's server makes adversarial inputs, through layers like the node's.

The server holds the middle of the network alone. It fits shadow input layers of its own to
unlabelled images, which need not be of the task, so that what they send through the middle has the
statistics of what nodes sent in a round of training. Then it moves natural images, each pixel
within a budget, to where the features of the middle move furthest. This needs neither labels nor a
head and changes no message; what it makes is meant for the whole trained network of the node.

Source: Fan, Chen, Wang, Zhou, Huang, "On the Robustness of Split Learning against Adversarial
Attacks", ECAI 2023, https://arxiv.org/abs/2307.07916, and its code,
https://github.com/fmy266/SplitADV.

Departures: the paper's losses and budgets were not to be had, and its code lacks the attack itself.
The shadows are the code's for ResNet-18, MobileNetV2 and DenseNet: of single convolutions kernel,
stride and padding, of blocks channels and strides. They differ where other splits have the same
sizes (blocks at ResNet's first and MobileNetV2's fourth) and at MobileNetV2's third, whose single
convolution has a kernel of 3 and a stride of 4. Its EfficientNet follows no rule. The rest is
ours, every choice a setting, hence "SPADV-style":
- Stage 1 matches mean and spread of every channel at the cut and after each layer of the middle.
  Beside or instead of that it makes a critic take its output for what was sent, or makes the kernel
  distance of both small, or that of the features above the middle (``prior``). It is fitted after a
  round of training, to what nodes sent in it, where the code trains beside the rounds.
- Stage 2 climbs by the signs of gradients.
- A shadow ``same`` as the node's layers is no part of the source; it is the stronger adversary who
  knows the architecture.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attacks.building_blocks.likeness import (
    PRIORS,
    channel_moments,
    kernel_distance,
    logistic_loss,
    prior_distance,
    row_critic,
)
from attacks.building_blocks.public_images import BatchSampler
from leakbed.contracts import (
    Evidence,
    Guess,
    Knowledge,
    MissingKnowledgeError,
    Seat,
    ThreatModel,
    UnfitViewError,
    View,
)
from leakbed.models.networks import BasicBlock
from leakbed.perturbation import (
    DISTANCES,
    Normalised,
    against_features,
    ascend,
    check_budget,
    check_normalisation,
)
from leakbed.seeds import derive, generator, scoped

SHADOWS = ("single", "multi", "same")
_TABULATED = {(32, 8): (9, 3), (32, 4): (9, 6)}
"""Kernel and stride of the code's single convolutions between these sides, without padding."""
_CHUNK = 256  # images moved at once; bounds memory at the widest layer
_CRITIC_BETA = 0.5  # Adam's first momentum on a critic, as in FORA and SDAR
_WEIGHTS = ("moments", "critic", "mmd", "prior")
_FIRST = 32  # the most channels of the source's first block
_MAPS = 3  # dimensions of one row of feature maps: channels, height, width


@dataclass(frozen=True, kw_only=True)
class SplitAdversarial:
    """Adversarial inputs from the middle of a U-shaped network.

    Attributes:
        shadow: ``single``, one convolution without bias; ``multi``, residual blocks; ``same``, the
            node's own layers, whose architecture is then known.
        budgets: The most by which a pixel may change, in [0, 1], before any normalisation; one
            batch of images is made for each, and the first leads the score.
        distance: How far features moved, ``l2`` or ``cosine``.
        layer: Of which layer of the server's own part, from 0; -1 is its last.
        moments: Weight of the means and spreads.
        critic: Weight of the loss of a critic that tells the shadow's rows from those sent, and
            learns beside it; 0 leaves it out, as in all weights.
        mmd: Weight of the kernel distance of a batch from as many rows that were sent.
        prior: Weight of the distance of the features at the server's last layer.
        prior_by: That distance: ``cosine`` of the mean features, or the kernel distance ``mmd``.
        critic_rate: Learning rate of the critic's Adam.
        steps: Steps of fitting the shadow; 0 leaves it untrained.
        batch: Images in each.
        rate: Learning rate of Adam.
        ascent: Steps of moving the images.
        stride: How far each goes, as a share of the budget.
        mean: What the shadow subtracts of each channel first; none where it normalises nothing.
        std: By what it divides.
    """

    name: ClassVar[str] = "spadv"
    source: ClassVar[str] = "Fan et al., ECAI 2023, https://arxiv.org/abs/2307.07916"

    shadow: str = "single"
    budgets: Sequence[float] = (0.2, 0.1)
    distance: str = "l2"
    layer: int = -1
    moments: float = 1.0
    critic: float = 0.0
    mmd: float = 0.0
    prior: float = 0.0
    prior_by: str = "cosine"
    critic_rate: float = 2e-4
    steps: int = 400
    batch: int = 128
    rate: float = 1e-3
    ascent: int = 20
    stride: float = 0.125
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    def __post_init__(self) -> None:
        """Check the settings that need no view.

        Raises:
            ValueError: If one is out of range; names the legal values.
        """
        if self.shadow not in SHADOWS:
            raise ValueError(f"shadow {self.shadow!r} is unknown; use {', '.join(SHADOWS)}")
        if self.distance not in DISTANCES:
            raise ValueError(f"distance {self.distance!r} is unknown; use {', '.join(DISTANCES)}")
        if self.prior_by not in PRIORS:
            raise ValueError(f"prior_by {self.prior_by!r} is unknown; use {', '.join(PRIORS)}")
        if not self.budgets:
            raise ValueError("budgets is empty; name one or more, such as [0.2, 0.1]")
        for budget in self.budgets:
            check_budget(budget)
        check_normalisation(self.mean, self.std)
        if self.steps < 0 or self.batch < 1 or self.ascent < 1:
            raise ValueError(
                f"steps = {self.steps}, batch = {self.batch}, ascent = {self.ascent}: use steps "
                "of 0 or more, the others of 1 or more"
            )
        if not (self.rate > 0 and self.stride > 0 and self.critic_rate > 0):
            raise ValueError(
                f"rate = {self.rate}, stride = {self.stride}, critic_rate = {self.critic_rate}: "
                "each must be above 0"
            )
        self._check_weights()

    def _check_weights(self) -> None:
        weights = {name: getattr(self, name) for name in _WEIGHTS}
        legal = all(0 <= weight < inf for weight in weights.values())
        if not legal or (self.steps and not any(weights.values())):
            raise ValueError(
                f"{', '.join(f'{name} = {weight}' for name, weight in weights.items())}: none may "
                "be below 0, and a shadow that is fitted needs one above it (steps = 0 fits none)"
            )

    @property
    def threat(self) -> ThreatModel:
        """A passive server with its own part, unlabelled images, and images to be moved."""
        needs = {Knowledge.SERVER_PART, Knowledge.PUBLIC_IMAGES, Knowledge.NATURAL_IMAGES}
        if self.shadow == "same":
            needs.add(Knowledge.ARCHITECTURE)
        return ThreatModel(
            seat=Seat.SERVER, evidence=frozenset({Evidence.ROUND_SMASHED}), needs=frozenset(needs)
        )

    def run(self, view: View, *, seed: int) -> Guess:
        """Fit a shadow to what was sent, and move the natural images through it.

        Args:
            view: With the server's part, public and natural images, and a round's smashed data.
            seed: Fixes the shadow's first weights, its batches and where the images start.

        Returns:
            For each natural image one moved within each budget; ``failed`` where it is not finite.
        """
        return self.crafted(self.fitted(view, seed=seed), view, seed=seed)

    def check(self, view: View) -> None:
        """Refuse before any training what could not work after it.

        Args:
            view: As it is before the first message: with ``smashed_shape``, and no evidence.

        Raises:
            MissingKnowledgeError: If something is missing that needs no message.
            UnfitViewError: If what is there does not fit the settings; says what would.
        """
        if view.server_part is None or view.public_images is None:
            raise MissingKnowledgeError("spadv needs the server's part and public images")
        channels = view.image_shape[0]
        if tuple(view.public_images.shape[1:]) != view.image_shape:
            raise UnfitViewError(
                f"public images have shape {tuple(view.public_images.shape[1:])}, those to be "
                f"moved {view.image_shape}; resize them, or choose another public set"
            )
        if self.batch > len(view.public_images):
            raise UnfitViewError(
                f"{len(view.public_images)} public images cannot fill a batch of {self.batch}; "
                "lower batch, or give the adversary more (data.public)"
            )
        if len(self.mean) not in {0, channels}:
            raise UnfitViewError(
                f"mean and std are of {len(self.mean)} channels, the images have {channels}; give "
                "one of each per channel, or leave both out"
            )
        count = len(list(view.server_part.children()))
        if not -count <= self.layer < count:
            raise UnfitViewError(
                f"layer {self.layer} is none of the server's: its part has {count} layers, so use "
                f"0 to {count - 1}, or -1 for the last"
            )

    def untrained(self, view: View, *, seed: int) -> nn.Module:
        """Return a shadow that was fitted to nothing.

        Args:
            view: Says which shapes it reads and makes.
            seed: Of its weights.

        Returns:
            Its first weights, on the view's device.

        Raises:
            MissingKnowledgeError: If the view has no shape of smashed data.
        """
        self.check(view)
        shape = view.smashed_shape
        if view.round_smashed is not None:
            shape = tuple(view.round_smashed.shape[1:])
        if shape is None:
            raise MissingKnowledgeError("spadv needs smashed data of a round of training")
        with scoped(derive(seed, "shadow")):
            layers = self._layers(view, shape, stream=derive(seed, "shadow"))
        if self.mean:
            layers = Normalised(layers, mean=self.mean, std=self.std, channels=view.image_shape[0])
        return layers.to(view.device)

    def fitted(self, view: View, *, seed: int) -> nn.Module:
        """Return a shadow whose images look like the nodes' to the server's part (stage 1).

        Args:
            view: As for :meth:`run`.
            seed: Of its weights and batches.

        Returns:
            It, in evaluation mode.

        Raises:
            MissingKnowledgeError: If the view has no smashed data, server's part or public images.
            UnfitViewError: If none of the smashed rows is finite.
        """
        shadow = self.untrained(view, seed=seed)
        if view.round_smashed is None or view.server_part is None or view.public_images is None:
            raise MissingKnowledgeError("spadv needs smashed data of a round of training")
        whole = view.round_smashed.flatten(1).isfinite().all(1)
        if not whole.any():
            raise UnfitViewError("none of the smashed rows is finite; spadv has nothing to fit to")
        draws = BatchSampler(view.public_images, stream=derive(seed, "batches"))
        adam = torch.optim.Adam(shadow.train().parameters(), self.rate)
        with scoped(derive(seed, "fit")):
            sent = _Sent(self, view.round_smashed[whole], view.server_part, seed=seed)
            for _ in range(self.steps):
                adam.zero_grad()
                made = shadow(view.public_images[draws.places(self.batch)])
                sent.loss(made).backward()
                adam.step()
                sent.learn(made.detach())
        return shadow.eval()

    def taught(
        self,
        view: View,
        images: Float[Tensor, " pairs channels height width"],
        smashed: Float[Tensor, " pairs *cut"],
        *,
        seed: int,
    ) -> nn.Module:
        """Return a shadow that was told what some images send: what no server knows.

        It bounds what the same shadow could learn from statistics alone.

        Args:
            view: As for :meth:`run`.
            images: Of the node.
            smashed: What the node's layers make of them.
            seed: Of its weights and batches.

        Returns:
            It, in evaluation mode.
        """
        shadow = self.untrained(view, seed=seed)
        draws = BatchSampler(images, stream=derive(seed, "pairs"))
        rows = min(self.batch, len(images))
        adam = torch.optim.Adam(shadow.train().parameters(), self.rate)
        for _ in range(self.steps):
            chosen = draws.places(rows)
            adam.zero_grad()
            (shadow(images[chosen]) - smashed[chosen]).square().mean().backward()
            adam.step()
        return shadow.eval()

    def crafted(self, bottom: nn.Module, view: View, *, seed: int) -> Guess:
        """Return the natural images, moved so that features move furthest (stage 2).

        Args:
            bottom: From images to what the server's part reads, in evaluation mode.
            view: With ``natural_images`` and the server's part.
            seed: Of where the images start.

        Returns:
            Images for every budget; ``failed`` where the features are not finite.

        Raises:
            MissingKnowledgeError: If the view has no natural images or server's part.
        """
        images, part = view.natural_images, view.server_part
        if images is None or part is None:
            raise MissingKnowledgeError("spadv needs natural images to move")
        stages = list(part.children())
        last = self.layer % len(stages) + 1
        layers = nn.Sequential(bottom, *stages[:last]).eval()
        drawn = generator(derive(seed, "start"))
        moved = torch.stack(
            [
                torch.cat([self._moved(layers, chunk, budget, drawn) for chunk in _chunks(images)])
                for budget in self.budgets
            ],
            dim=1,
        )
        return Guess(
            adversarial=moved,
            budgets=tuple(self.budgets),
            failed=~moved.isfinite().flatten(1).all(1),
        )

    def _moved(
        self, layers: nn.Module, images: Tensor, budget: float, drawn: torch.Generator
    ) -> Tensor:
        climbed = against_features(layers, images, distance=self.distance)
        return ascend(
            climbed,
            images,
            budget=budget,
            step=self.stride * budget,
            steps=self.ascent,
            generator=drawn,
        )

    def _layers(self, view: View, shape: tuple[int, ...], *, stream: int) -> nn.Module:
        if self.shadow == "same":
            if view.architecture is None:
                raise MissingKnowledgeError("shadow = 'same' needs the architecture")
            return view.architecture.bottom(stream)
        if self.shadow == "multi":
            return _blocks(view.image_shape, shape)
        return _convolution(view.image_shape, shape)


class _Sent:
    """What nodes sent in a round, as a shadow's rows are compared with it.

    Means and spreads are of all rows. The kernel distances and the critic see as many of them as
    the shadow makes in a step.
    """

    def __init__(
        self, attack: SplitAdversarial, smashed: Tensor, part: nn.Module, *, seed: int
    ) -> None:
        self._attack, self._stages = attack, list(part.children())
        self._draws = BatchSampler(smashed, stream=derive(seed, "sent"))
        self._received = smashed[:0]  # of this step
        self._moments = []
        with torch.no_grad():
            for made in _after_each(self._stages, smashed):
                self._moments.append(channel_moments(made))
                self._features = made
        self._critic: nn.Module | None = None
        if attack.critic:
            self._critic = row_critic(tuple(smashed.shape[1:])).to(smashed.device).train()
            self._adam = torch.optim.Adam(
                self._critic.parameters(), attack.critic_rate, betas=(_CRITIC_BETA, 0.999)
            )

    def loss(self, made: Float[Tensor, " batch *cut"]) -> Float[Tensor, ""]:
        """Return what the shadow makes small, of all terms that have a weight."""
        attack, terms = self._attack, []
        places = self._draws.places(min(len(made), len(self._draws.images)))
        self._received = self._draws.images[places]
        within = list(_after_each(self._stages, made))
        if attack.moments:
            pairs = zip(map(channel_moments, within), self._moments, strict=True)
            terms.append(attack.moments * torch.stack([_apart(*pair) for pair in pairs]).sum())
        if self._critic is not None:
            terms.append(attack.critic * logistic_loss(self._critic(made), high=True))
        if attack.mmd:
            terms.append(attack.mmd * kernel_distance(made, self._received))
        if attack.prior:
            target = self._features if attack.prior_by == "cosine" else self._features[places]
            terms.append(attack.prior * prior_distance(within[-1], target, by=attack.prior_by))
        return torch.stack(terms).sum()

    def learn(self, made: Float[Tensor, " batch *cut"]) -> None:
        """Let the critic learn from the rows it was shown last."""
        if self._critic is None:
            return
        real, shown = self._critic(self._received), self._critic(made)
        self._adam.zero_grad()
        (logistic_loss(real, high=True) + logistic_loss(shown, high=False)).backward()
        self._adam.step()


def _convolution(image: tuple[int, ...], smashed: tuple[int, ...]) -> nn.Module:
    """Return one layer without bias from images to smashed data."""
    if len(smashed) != _MAPS:
        return _flat(image, smashed)
    kernels, strides = [], []
    for side, wanted in zip(image[1:], smashed[1:], strict=True):
        kernel, stride = _TABULATED.get((side, wanted), (0, 0))
        if not kernel:
            stride = max(side // wanted, 1)
            kernel = max(side - (wanted - 1) * stride, 1)
        kernels.append(kernel)
        strides.append(stride)
    same = tuple(image[1:]) in {tuple(smashed[1:]), tuple(2 * side for side in smashed[1:])}
    if same:  # as tabulated: kernel 3, padded by 1
        return nn.Conv2d(image[0], smashed[0], 3, stride=strides[0], padding=1, bias=False)
    layer = nn.Conv2d(
        image[0], smashed[0], (kernels[0], kernels[1]), stride=(strides[0], strides[1]), bias=False
    )
    return nn.Sequential(layer, nn.AdaptiveAvgPool2d((smashed[1], smashed[2])))


def _blocks(image: tuple[int, ...], smashed: tuple[int, ...]) -> nn.Module:
    """Return residual blocks from images to smashed data; the last ones halve the side.

    Each has twice the channels of the one before. There is one before the first that halves, and as
    many more as it takes to begin with 32 channels or fewer: so are most of the source's stacks.
    """
    if len(smashed) != _MAPS:
        return _flat(image, smashed)
    halvings, side = 0, image[1]
    while side >= 2 * smashed[1]:
        halvings, side = halvings + 1, -(-side // 2)
    before = halvings
    while smashed[0] > _FIRST << before:
        before += 1
    channels, layers = image[0], list[nn.Module]()
    for left in range(before, -1, -1):
        width = max(smashed[0] >> left, 1)
        layers.append(BasicBlock(channels, width, stride=2 if left < halvings else 1))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d((smashed[1], smashed[2])))


def _flat(image: tuple[int, ...], smashed: tuple[int, ...]) -> nn.Module:
    """Return one linear layer without bias, where smashed data are no maps."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(prod(image), prod(smashed), bias=False),
        nn.Unflatten(1, smashed),
    )


def _after_each(stages: list[nn.Module], smashed: Tensor) -> Iterator[Tensor]:
    """Return smashed data, and what they are after each layer of the server's part."""
    yield smashed
    for stage in stages:
        smashed = stage(smashed)
        yield smashed


def _apart(own: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> Tensor:
    """Return how far moments lie apart, in units of the spreads of what was sent."""
    scale = theirs[1].square().mean()
    squares = sum(
        ((a - b).square().mean() for a, b in zip(own, theirs, strict=True)), torch.zeros(())
    )
    return squares / scale


def _chunks(images: Tensor) -> tuple[Tensor, ...]:
    return torch.split(images, _CHUNK)
