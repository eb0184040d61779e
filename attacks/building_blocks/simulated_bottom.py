"""A bottom simulated from one's own images so that its output looks like what nodes send.

A passive server never queries a node's bottom. It trains one of its own on its own images, pulled
towards the smashed data it receives by whichever of these terms has a weight, and a decoder that
inverts it; the decoder then reads the nodes' smashed data. The same step serves beside a training
(:meth:`SimulatedBottom.watch`, one batch of a node at a time) and on the rows of a finished round
(:meth:`SimulatedBottom.run`).

=========== =================================================================== ==================
term        what is made small                                                  source
=========== =================================================================== ==================
``task``    the cross-entropy of the public labels, through the server's part   SDAR, PCAT
``critic``  the loss of a critic that tells simulated rows from received ones   SDAR, FORA
``mmd``     the distance of both kinds of rows under five Gaussian kernels      FORA
``moments`` the distance of each channel's mean and deviation                   own
``prior``   the distance of both kinds of features above the server's part      own
=========== =================================================================== ==================

Sources: Zhu, Luo, Wu, Jiang, Xiao, Ooi, *Passive Inference Attacks on Split Learning via
Adversarial Regularization* (SDAR), NDSS 2025, https://arxiv.org/abs/2310.10483, and its code,
https://github.com/zhxchd/SDAR_SplitNN. Xu, Yang, Yi, Li, Wang, Hu, Zhuang, Liu, *A Stealthy
Wrongdoer: Feature-Oriented Reconstruction Attack against Split Learning* (FORA), CVPR 2024,
https://arxiv.org/abs/2405.04115, and its code, https://github.com/X1aoyangXu/FORA. Gao, Zhang,
*PCAT: Functionality and Data Stealing from Split Learning by Pseudo-Client Attack*, USENIX Security
2023 (``aligned``).

Departures:
- Both critics are small, with the logistic loss; FORA's has a Wasserstein loss with a penalty.
- The decoder is dense, of one hidden layer, for rows of any shape; the papers' are convolutions.
- SDAR's second critic, on images, is left out: at its published rate it does not move. So is what
  reads the private label: nothing here is conditional.
- All targets share one simulator, so no target is attacked independently of the others. Rows that
  are not finite are left out of the learning and marked as failed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Adam

from attacks.building_blocks.gan_networks import NoPilotError, blueprint
from attacks.building_blocks.likeness import (
    PRIORS,
    kernel_distance,
    logistic_loss,
    moment_distance,
    prior_distance,
    row_critic,
)
from attacks.building_blocks.public_images import BatchSampler, public_images
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
from leakbed.lookup import unknown_name
from leakbed.seeds import derive, generator, scoped

SIMULATORS = ("architecture", "pilot")

_RANGES = {
    "0 or more": ("task", "critic", "mmd", "moments", "prior", "starts"),
    "1 or more": ("steps", "batch_rows", "decoder_width"),
    "positive": ("rate", "decoder_rate", "critic_rate"),
    "in [0, 1)": ("label_flip", "critic_beta"),
}
_LEGAL: dict[str, Callable[[float], bool]] = {
    "0 or more": lambda value: 0 <= value < inf,
    "1 or more": lambda value: value >= 1,
    "positive": lambda value: 0 < value < inf,
    "in [0, 1)": lambda value: 0 <= value < 1,
}
_CHUNK = 256  # rows decoded at once
_UNLABELLED = (
    "aligns its images with the labels of the batch, which this node does not send; set "
    'aligned = false, or use a protocol with protocol.labels = "shared"'
)


@dataclass(kw_only=True, eq=False)
class Simulation:
    """What an attack with a simulated bottom holds; changed in place as it learns.

    Attributes:
        simulator: From images to rows like the nodes', without the ReLU that may end it.
        adam: Over the simulator, and over the head where there is one.
        draws: Its own images.
        labels: Of these; None where it has none.
        stream: From which every step draws.
        chance: Draws flipped labels and aligned images.
        unit: Whether the simulator reads pixels in [0, 1]; a pilot reads [-1, 1].
        rectified: Whether a ReLU ends the simulator; None until the first batch.
        turns: Batches seen so far.
        critic: Tells received rows (high) from simulated ones; None without that term.
        critic_adam: Over it.
        decoder: From rows to images; None where nothing is to be decoded.
        decoder_adam: Over it.
        head: Its own in place of the node's, of a U-shape; None elsewhere.
        part: The server's own part, as it was shown last.
        losses: Of the last step, before it, by term; ``decoder`` and ``critic_own`` beside them.
    """

    simulator: nn.Module
    adam: Adam
    draws: BatchSampler
    labels: Int[Tensor, " public"] | None
    stream: int
    chance: torch.Generator
    unit: bool
    rectified: bool | None
    turns: int = 0
    critic: nn.Module | None = None
    critic_adam: Adam | None = None
    decoder: nn.Module | None = None
    decoder_adam: Adam | None = None
    head: nn.Module | None = None
    part: nn.Module | None = None
    losses: dict[str, float]

    def simulated(self, images: Float[Tensor, " batch *image"]) -> Float[Tensor, " batch *cut"]:
        """Return the rows that the simulator makes of images in [0, 1]."""
        made: Tensor = self.simulator(images if self.unit else images.mul(2).sub(1))
        return made.relu() if self.rectified else made

    def features(self, rows: Float[Tensor, " batch *cut"]) -> Float[Tensor, " batch *upper"]:
        """Return what the server's part makes of rows.

        Args:
            rows: Received or simulated.

        Returns:
            Features, or logits.

        Raises:
            MissingKnowledgeError: If nobody gave the server's part.
        """
        if self.part is None:
            raise MissingKnowledgeError(
                "the attack passes rows through the server's own part, and was given none; let the "
                "threat model name Knowledge.SERVER_PART"
            )
        made: Tensor = self.part(rows.clone())  # its first layer may work in place
        return made


@dataclass(frozen=True, kw_only=True)
class SimulatedBottom:
    """The settings of every attack with a simulated bottom, and the attack itself.

    Attributes:
        steps: Batches that are learned from on a trace; beside a training, every one sent.
        batch_rows: Rows of such a batch on a trace, fewer where the round, or its own images, are
            fewer; beside a training it is the nodes' batch, which its own images must fill.
        starts: Batches of a training that are let pass before the first is learned from.
        simulator: ``"architecture"`` takes the node's layers with weights of its own, ``"pilot"`` a
            small network for rows of the same shape, which the attack then needs not know.
        task: Weight of the cross-entropy through the server's part; 0 leaves the term out, as in
            all weights.
        critic: Weight of the critic's term.
        mmd: Weight of the kernel distance at the cut.
        moments: Weight of the distance of the channels' moments at the cut.
        moments_within: Whether the moments after each layer of the server's part count as well.
        prior: Weight of the distance of the features above the server's part.
        prior_by: That distance: ``"mmd"``, or ``"cosine"`` between the features' means.
        aligned: Whether public images are drawn by the labels of the batch they stand beside.
        label_flip: Share of the public labels that are drawn anew, where the attack has a head of
            its own; it keeps that head from being sure of itself.
        decodes: Whether a decoder is trained; without one the attack guesses no images.
        decoder_width: Units of its hidden layer.
        rate: Adam's step size on simulator and head.
        decoder_rate: On the decoder.
        critic_rate: On the critic.
        critic_beta: Adam's first momentum on the critic.
    """

    steps: int = 1200
    batch_rows: int = 64
    starts: int = 0
    simulator: str = "architecture"
    task: float = 0.0
    critic: float = 0.0
    mmd: float = 0.0
    moments: float = 0.0
    moments_within: bool = False
    prior: float = 0.0
    prior_by: str = "mmd"
    aligned: bool = False
    label_flip: float = 0.0
    decodes: bool = True
    decoder_width: int = 400
    rate: float = 1e-3
    decoder_rate: float = 1e-3
    critic_rate: float = 2e-4
    critic_beta: float = 0.5

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        for setting, legal in (("simulator", SIMULATORS), ("prior_by", PRIORS)):
            if (value := getattr(self, setting)) not in legal:
                raise ValueError(unknown_name(setting, value, legal))
        for range_, settings in _RANGES.items():
            for setting in settings:
                if not _LEGAL[range_](value := getattr(self, setting)):
                    raise ValueError(f"{setting} is {value}; it must be {range_}")

    @property
    def threat(self) -> ThreatModel:
        """A server that reads smashed data, owns images, and knows what its terms need."""
        needs = {Knowledge.PUBLIC_IMAGES}
        if self.simulator == "architecture" or self.task:
            needs.add(Knowledge.ARCHITECTURE)
        if self.task or self.aligned:
            needs.add(Knowledge.PUBLIC_LABELS)
        if self.task or self.prior or self._reads_layers:
            needs.add(Knowledge.SERVER_PART)
        return ThreatModel(
            seat=Seat.SERVER,
            evidence=frozenset({Evidence.SMASHED, Evidence.ROUND_SMASHED}),
            needs=frozenset(needs),
        )

    @property
    def _reads_layers(self) -> bool:
        return bool(self.moments) and self.moments_within

    def check(self, view: View) -> None:
        """Refuse before any training what could not work after it.

        Args:
            view: As it is before the first message; ``round_labels`` is there where nodes will send
                labels, and holds none.

        Raises:
            MissingKnowledgeError: If images are to be aligned with labels that no node will send.
        """
        public_images(view)
        if self.aligned and view.round_labels is None:
            raise MissingKnowledgeError(f"{self.name} {_UNLABELLED}")

    def run(self, view: View, *, seed: int) -> Guess:
        """Learn from the rows of a finished round, and decode every target.

        Args:
            view: With ``smashed``, ``round_smashed`` and what the threat model names.
            seed: Fixes every random choice.

        Returns:
            An image per target; of a U-shape through which a head was trained, a label as well.

        Raises:
            MissingKnowledgeError: If the view lacks the rows.
            UnfitViewError: If none of the rows is finite.
        """
        if view.smashed is None or view.round_smashed is None:
            raise MissingKnowledgeError(
                f"{self.name} learns from the smashed data of a whole round and decodes some of "
                "it; the view must hold smashed and round_smashed"
            )
        whole = view.round_smashed.flatten(1).isfinite().all(1)
        seen = view.round_smashed[whole]
        if not len(seen):
            raise UnfitViewError(f"{self.name}: none of the round's smashed rows is finite")
        labels = None if view.round_labels is None else view.round_labels[whole]
        owned = self.batch_rows if view.public_images is None else len(view.public_images)
        rows = min(self.batch_rows, len(seen), owned)
        state = self._begun(view, tuple(seen.shape[1:]), seed=seed)
        order = BatchSampler(seen, stream=derive(seed, "order"))
        for _ in range(self.steps):
            places = order.places(rows)
            told = None if labels is None else labels[places]
            state = self.watch(state, seen[places], labels=told, part=view.server_part)
        return self.guess(state, view.smashed)

    def begin(self, view: View, *, seed: int) -> Simulation:
        """Build the networks for what will be sent; refuse what cannot work.

        Args:
            view: With ``smashed_shape``, ``rows`` and what the threat model names.
            seed: Draws the weights, the public batches and what the critic drops.

        Returns:
            The state before the first batch.

        Raises:
            MissingKnowledgeError: If the view says no shape.
        """
        if view.smashed_shape is None:
            raise MissingKnowledgeError(
                f"{self.name} builds its networks for one shape of smashed data, and the view says "
                "none; set smashed_shape"
            )
        return self._begun(view, view.smashed_shape, seed=seed)

    def watch(
        self,
        state: Simulation,
        smashed: Float[Tensor, " batch *cut"],
        *,
        labels: Int[Tensor, " batch"] | None,
        part: nn.Module | None,
    ) -> Simulation:
        """Take one step of every network beside a batch.

        All of the simulator's terms are of the weights before its step; the critic then learns from
        the rows it was shown, and the decoder from those of the stepped simulator, as in SDAR.

        Args:
            state: Consumed.
            smashed: As a node sent it; rows that are not finite are left out.
            labels: Of its rows; read only where images are ``aligned``.
            part: The server's own part; read only by terms that need it.

        Returns:
            The state.
        """
        state.part, state.turns = part, state.turns + 1
        whole = smashed.flatten(1).isfinite().all(1)
        if state.turns <= self.starts or not whole.any():
            return state
        received = state.draws.like(smashed[whole])
        if state.rectified is None:
            state.rectified = bool((received >= 0).all())
        places = self._places(state, None if labels is None else labels[whole])
        places = state.draws.places(len(received)) if places is None else places
        images = state.draws.images[places]
        with scoped(derive(state.stream, f"step/{state.turns}")):
            self._step(state, received, images, places)
        return state

    def guess(self, state: Simulation, smashed: Float[Tensor, " batch *cut"]) -> Guess:
        """Decode a smashed batch of any node: to an image per row, a label per row, or both."""
        rows = state.draws.like(smashed)
        images, labels, failed = None, None, ~rows.flatten(1).isfinite().all(1)
        with torch.no_grad():
            if state.decoder is not None:
                made = torch.cat([state.decoder(chunk) for chunk in rows.split(_CHUNK)])
                failed = failed | ~made.flatten(1).isfinite().all(1)
                images = made.unflatten(1, state.draws.images.shape[1:]).unsqueeze(1).to(smashed)
            if state.head is not None and state.part is not None:
                above = [state.features(chunk) for chunk in rows.split(_CHUNK)]
                logits = torch.cat([state.head(chunk) for chunk in above])
                labels = logits.argmax(1, keepdim=True)
        return Guess(images=images, labels=labels, failed=failed)

    def _begun(self, view: View, smashed_shape: tuple[int, ...], *, seed: int) -> Simulation:
        """Return the networks before the first batch."""
        images, labels = public_images(view)
        if self.task and labels is None:
            raise MissingKnowledgeError(
                f"{self.name} trains on the labels of its own images, and the view has none; set "
                "task = 0, or give the adversary labels"
            )
        device = images.device
        simulator = self._simulator(view, smashed_shape, seed=seed).to(device).train()
        head = self._head(view, seed=seed)
        trained = list(simulator.parameters())
        if head is not None:
            head = head.to(device).eval()
            trained += head.parameters()
        pilot = self.simulator == "pilot"
        state = Simulation(
            simulator=simulator,
            adam=Adam(trained, lr=self.rate),
            draws=BatchSampler(images, stream=derive(seed, "public")),
            labels=labels,
            stream=derive(seed, "steps"),
            chance=generator(derive(seed, "chance")),
            unit=not pilot,
            rectified=None if pilot else False,
            head=head,
            part=view.server_part,
            losses={},
        )
        if self.critic:
            with scoped(derive(seed, "critic")):
                state.critic = row_critic(smashed_shape).to(device).train()
            betas = (self.critic_beta, 0.999)
            state.critic_adam = Adam(state.critic.parameters(), lr=self.critic_rate, betas=betas)
        if self.decodes:
            pixels = images[0].numel()
            with scoped(derive(seed, "decoder")):
                state.decoder = _decoder(smashed_shape, pixels, self.decoder_width).to(device)
            state.decoder_adam = Adam(state.decoder.parameters(), lr=self.decoder_rate)
        return state

    def _simulator(self, view: View, smashed_shape: tuple[int, ...], *, seed: int) -> nn.Module:
        """Return the simulator with fresh weights, of rows of the nodes' shape."""
        stream = derive(seed, "simulator")
        if self.simulator == "architecture":
            if view.architecture is None:
                raise MissingKnowledgeError(
                    f"{self.name} simulates the node's own layers, and the view does not say them; "
                    'set simulator = "pilot", or let the threat model name the architecture'
                )
            return view.architecture.bottom(stream)
        try:
            plan = blueprint(
                view.image_shape, smashed_shape, nets="small", activations="swish", padding="auto"
            )
        except NoPilotError as error:
            raise UnfitViewError(
                f'{self.name}: {error}; or set simulator = "architecture"'
            ) from error
        return plan.pilot(stream)

    def _head(self, view: View, *, seed: int) -> nn.Module | None:
        """Return a head of its own, where the node keeps one and the task is trained through it."""
        if not self.task or view.architecture is None or view.architecture.upper_cut is None:
            return None
        return view.architecture.head(derive(seed, "head"))

    def _places(
        self, state: Simulation, labels: Int[Tensor, " batch"] | None
    ) -> Int[Tensor, " batch"] | None:
        """Return public images with the labels of a batch; None where they are not aligned."""
        if not self.aligned:
            return None
        if labels is None or state.labels is None:
            raise MissingKnowledgeError(f"{self.name} {_UNLABELLED}")
        owned = state.labels.cpu()
        same = [torch.nonzero(owned == label).flatten() for label in labels.cpu()]
        everyone = torch.arange(len(owned))
        pools = [each if len(each) else everyone for each in same]
        drawn = [pool[torch.randint(len(pool), (), generator=state.chance)] for pool in pools]
        return torch.stack(drawn).to(state.draws.images.device)

    def _step(
        self,
        state: Simulation,
        received: Float[Tensor, " batch *cut"],
        images: Float[Tensor, " batch *image"],
        places: Int[Tensor, " batch"],
    ) -> None:
        """Take the steps: simulator (and head), critic, decoder."""
        simulated = state.simulated(images)
        terms = self._terms(state, received, simulated, places)
        if terms:
            state.adam.zero_grad()
            weighed = [getattr(self, name) * loss for name, loss in terms.items()]
            torch.stack(weighed).sum().backward()
            state.adam.step()
        losses = {name: loss.detach() for name, loss in terms.items()}
        if state.critic is not None and state.critic_adam is not None:
            real, made = state.critic(received), state.critic(simulated.detach())
            loss = logistic_loss(real, high=True) + logistic_loss(made, high=False)
            losses["critic_own"] = _stepped(loss, state.critic_adam)
        if state.decoder is not None and state.decoder_adam is not None:
            with torch.no_grad():
                rows = state.simulated(images)
            loss = nn.functional.mse_loss(state.decoder(rows), images.flatten(1))
            losses["decoder"] = _stepped(loss, state.decoder_adam)
        state.losses = {name: float(loss) for name, loss in losses.items()}

    def _terms(
        self,
        state: Simulation,
        received: Float[Tensor, " batch *cut"],
        simulated: Float[Tensor, " batch *cut"],
        places: Int[Tensor, " batch"],
    ) -> dict[str, Tensor]:
        """Return the simulator's terms that have a weight, unweighted."""
        terms: dict[str, Tensor] = {}
        above = state.features(simulated) if self.task or self.prior else simulated
        if self.task:
            logits = above if state.head is None else state.head(above)
            terms["task"] = nn.functional.cross_entropy(logits, self._labels(state, places, logits))
        if state.critic is not None:
            terms["critic"] = logistic_loss(state.critic(simulated), high=True)
        if self.mmd:
            terms["mmd"] = kernel_distance(simulated, received)
        if self.moments:
            pairs = [(simulated, received)]
            if self._reads_layers:
                pairs += _through(state, simulated, received)
            terms["moments"] = torch.stack([moment_distance(*pair) for pair in pairs]).sum()
        if self.prior:
            with torch.no_grad():
                target = state.features(received)
            terms["prior"] = prior_distance(above, target, by=self.prior_by)
        return terms

    def _labels(
        self, state: Simulation, places: Int[Tensor, " batch"], logits: Tensor
    ) -> Int[Tensor, " batch"]:
        """Return the labels that public images are trained on; some are drawn anew."""
        if state.labels is None:
            raise MissingKnowledgeError(f"{self.name} has no labels of its own images")
        labels = state.labels[places]
        if state.head is None or not self.label_flip:
            return labels
        drawn = torch.rand(len(labels), generator=state.chance).to(labels.device)
        fresh = torch.randint(logits.shape[1], labels.shape, generator=state.chance)
        return torch.where(drawn < self.label_flip, fresh.to(labels.device), labels)


def _through(state: Simulation, one: Tensor, other: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return what each layer of the server's part makes of two batches."""
    if state.part is None:
        raise MissingKnowledgeError(
            "moments_within reads the layers of the server's own part, and the view has none"
        )
    pairs = []
    for layer in state.part.children():
        one, other = layer(one.clone()), layer(other.clone())
        pairs.append((one, other.detach()))
    return pairs


def _stepped(loss: Tensor, adam: Adam) -> Tensor:
    """Take a step down a loss, and return the loss before it."""
    adam.zero_grad()
    loss.backward()
    adam.step()
    return loss.detach()


def _decoder(shape: tuple[int, ...], pixels: int, width: int) -> nn.Sequential:
    """Return a decoder from rows to pixels in [0, 1], flat."""
    hidden = nn.Linear(torch.Size(shape).numel(), width)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(width, pixels), nn.Sigmoid())
