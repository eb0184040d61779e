"""Feature-space hijacking: a malicious server steers a client's bottom into a space it can invert.

The server trains a pilot and a decoder on its own images, and a critic that tells the client's
feature maps from the pilot's. Instead of the task's gradient the client gets the critic's: its
bottom learns to look like the pilot, and the decoder reads whatever it sends.

Source: Pasquini, Ateniese, Bernaschi, *Unleashing the Tiger: Inference Attacks on Split Learning*,
CCS 2021, https://arxiv.org/abs/2012.02670, and its code,
https://github.com/pasquini-dario/SplitNN_FSHA, which runs a Wasserstein loss with gradient penalty
where the paper's equations 1 to 3 have logarithms. The critic scores the pilot low and the client
high, and the client descends on its own score.

Departures:
- A pilot trained to low distance correlation beforehand (``pretraining``) stays as it is from then
  on, and so does its decoder; the paper's appendix B leaves it open.
- For its parts' own see :mod:`attacks.steering`, :mod:`attacks.hijacking_networks` and
  :mod:`attacks.critic`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Adam

from attacks.critic import EPSILON
from attacks.owned_images import owned_images
from attacks.steering import HijackSettings, Steering
from leakbed.contracts import Evidence, Guess, Knowledge, Seat, ThreatModel, View
from leakbed.distance_correlation import distance_correlation
from leakbed.seeds import derive

SMALL = {
    "nets": "small",
    "pilot_rate": 1e-3,
    "critic_rate": 1e-3,
    "critic_beta": 0.5,
    "penalty": "sample",
    "penalty_weight": 10.0,
}
"""Settings for grey images and minutes on a CPU, where the client's own rate is about 1e-3."""

_CHUNK = 256  # rows decoded at once


@dataclass(kw_only=True, eq=False)
class Hijacked(Steering):
    """What a hijacker holds; :meth:`FeatureSpaceHijacking.forge` consumes it.

    Attributes:
        decoder: From feature maps back to images.
        adam: Over pilot and decoder.
        prepared: Whether the pretraining is over, which follows the first smashed batch.
        autoencoder_loss: Of the last public batch, before the step; NaN before the first.
    """

    decoder: nn.Module
    adam: Adam
    prepared: bool
    autoencoder_loss: Float[Tensor, ""]


@dataclass(frozen=True, kw_only=True)
class FeatureSpaceHijacking(HijackSettings):
    """Reconstruction by a server that forges the cut gradient; published settings are the defaults.

    Attributes:
        without_class: Public images of this label are not used; -1 uses all.
        pretraining: Steps that fit pilot and decoder to low distance correlation before the first
            forgery; 0 trains them beside it, as published.
        fidelity: Weight of the reconstruction in those steps (appendix B).
    """

    without_class: int = -1
    pretraining: int = 0
    fidelity: float = 50.0

    name: ClassVar[str] = "fsha"
    source: ClassVar[str] = (
        "Pasquini, Ateniese, Bernaschi, CCS 2021, https://arxiv.org/abs/2012.02670"
    )

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__post_init__()
        if self.pretraining < 0:
            raise ValueError(f"pretraining is {self.pretraining}; it must be 0 or more")

    @property
    def threat(self) -> ThreatModel:
        """A server that rewrites gradients and owns images like the client's."""
        reads, needs = frozenset({Evidence.SMASHED}), frozenset({Knowledge.PUBLIC_IMAGES})
        return ThreatModel(seat=Seat.SERVER, evidence=reads, needs=needs, active=True)

    def begin(self, view: View, *, seed: int) -> Hijacked:
        """Build the three networks for what will be sent; refuse what no pilot can answer.

        Args:
            view: With ``public_images``, ``smashed_shape`` and ``rows``.
            seed: Draws the weights, the public batches and the penalty's points.

        Returns:
            The state before the first batch.
        """
        images, _ = owned_images(view, without_class=self.without_class)
        plan = self.plan(view)
        steering = self.steering(plan, images, seed=seed)
        grey = float(images.mean()) * 2 - 1 if self.pixels == "unit" else 0.0
        decoder = plan.decoder(derive(seed, "decoder"), grey=grey).to(images.device)
        both = [*steering.pilot.parameters(), *decoder.parameters()]
        return Hijacked(
            **vars(steering),
            decoder=decoder,
            adam=Adam(both, lr=self.pilot_rate, eps=EPSILON, fused=True),
            prepared=False,
            autoencoder_loss=torch.tensor(torch.nan),
        )

    def forge(
        self,
        state: Hijacked,
        smashed: Float[Tensor, " batch channels height width"],
        cut_gradient: Float[Tensor, " batch channels height width"],
    ) -> tuple[Hijacked, Float[Tensor, " batch channels height width"]]:
        """Return the gradient of the critic's score, and train the three networks one step.

        All losses are of the weights before any step, and the critic has one step, as published.
        That it comes before the pilot's changes nothing: neither reads what the other's writes.

        Args:
            state: Consumed.
            smashed: As the node sent it.
            cut_gradient: Not read.

        Returns:
            The state, and the forged gradient.
        """
        del cut_gradient
        private = state.received(smashed)
        if not state.prepared:
            self._prepare(state, len(private))
        images = state.draws.batch(len(private))
        public = state.mapped(images)
        forged = state.critic.answer(private, public).mul(self.gradient_scale)
        if not self.pretraining:
            _fit(state, images, public)
        return state, forged.to(smashed)

    def guess(
        self, state: Hijacked, smashed: Float[Tensor, " batch channels height width"]
    ) -> Guess:
        """Decode a smashed batch.

        Args:
            state: As it stands.
            smashed: Of any client.

        Returns:
            An image per row.
        """
        maps = state.draws.like(smashed)
        with torch.no_grad():
            decoded = torch.cat([state.decoder(chunk) for chunk in maps.split(_CHUNK)])
        images = decoded.add(1).div(2).unsqueeze(1).to(smashed)
        return Guess(images=images, failed=~images.flatten(1).isfinite().all(1))

    def _prepare(self, state: Hijacked, rows: int) -> None:
        """Fit pilot and decoder to a target space of low distance correlation, if asked to."""
        for _ in range(self.pretraining):
            images = state.draws.batch(rows)
            public = state.mapped(images)
            _fit(state, images, public, fidelity=self.fidelity)
        state.prepared = True


def _fit(state: Hijacked, images: Tensor, public: Tensor, *, fidelity: float | None = None) -> None:
    """Take one step of pilot and decoder, towards low correlation too where a fidelity is given."""
    error = nn.functional.mse_loss(state.decoder(public), images)
    loss = error
    if fidelity is not None:
        loss = distance_correlation(images, public) + fidelity * error
    state.adam.zero_grad()
    loss.backward()
    state.adam.step()
    state.autoencoder_loss = error.detach()
