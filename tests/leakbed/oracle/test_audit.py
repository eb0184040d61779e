"""Every claim of the catalogue is held against draws; planted faults of a mechanism are refuted."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from defenses import (
    DEFENSES,
    DPSGD,
    DPCutGradient,
    GradientCompression,
    IsoNoise,
    LabelDP,
    LocalDP,
    SmashedNoise,
    WeightNoise,
)
from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.contracts.noise_laws import Clean, Laplace, Normal, sent_law
from leakbed.oracle.audit import Audit, NoAuditError, audit, certain, epsilon_of, mu_of

CLAIMS: dict[str, tuple[Defense, ...]] = {
    "dp-cut-gradient": (DPCutGradient(epsilon=1.0), DPCutGradient(epsilon=8.0, horizon=3)),
    "dp-sgd": (),
    "label-dp": (LabelDP(epsilon=1.0),),
    "local-dp": (LocalDP(epsilon=8.0),),
    "smashed-noise": (SmashedNoise(sigma=1.0, clip=1.0),),
    "weight-noise": (WeightNoise(form="corrected", scale=1.0, clip=0.3),),
}
CASES = [each for claims in CLAIMS.values() for each in claims]


@dataclass(frozen=True, kw_only=True)
class Reuses(SmashedNoise):
    """The same noise in every message."""

    def protect_smashed(self, state: DefenseState, smashed: Tensor) -> tuple[DefenseState, Tensor]:
        return super().protect_smashed(replace(state, messages=0), smashed)


@dataclass(frozen=True, kw_only=True)
class Quiet(SmashedNoise):
    """Less noise than its law says."""

    def protect_smashed(self, state: DefenseState, smashed: Tensor) -> tuple[DefenseState, Tensor]:
        louder = SmashedNoise(sigma=0.9 * self.sigma, clip=self.clip)
        return louder.protect_smashed(state, smashed)


@dataclass(frozen=True, kw_only=True)
class OfLaplace(SmashedNoise):
    """Laplace noise on rows of L1 norm 1, of a scale that is worth its epsilon and no less."""

    epsilon: float = 1.0
    worth: float = 1.0

    def protect_smashed(self, state: DefenseState, smashed: Tensor) -> tuple[DefenseState, Tensor]:
        rows = smashed / smashed.abs().sum(1, keepdim=True)
        drawn = torch.rand(rows.shape, generator=state.generator()) - 0.5
        noise = -drawn.sign() * torch.log1p(-2 * drawn.abs())
        return state, rows + 2 / self.worth * noise

    def law(self, clean: Clean) -> Laplace:
        return Laplace(mean=clean.arrays, scales={})


def by_inputs(audits: list[Audit]) -> dict[str, Audit]:
    return {each.inputs: each for each in audits}


def test_every_defense_that_claims_is_listed() -> None:
    assert {name for name, kind in DEFENSES.items() if kind.claims} == set(CLAIMS)


@pytest.mark.parametrize("defense", CASES, ids=lambda each: each.name)
def test_no_claim_of_the_catalogue_is_refuted_and_tight_ones_are_nearly_reached(
    defense: Defense,
) -> None:
    audits = audit(defense, stream=7)
    assert audits
    for found in audits:
        assert found.holds, str(found)
        # For epsilons above 1 the published formula of local-dp is not the exact calibration.
        least = 0.6 if defense.name in {"local-dp", "weight-noise"} else 0.8
        assert found.found >= least * found.claimed, str(found)


def test_a_hundred_sound_audits_refute_nothing() -> None:
    defense = SmashedNoise(sigma=1.0, clip=1.0)
    audits = [each for stream in range(50) for each in audit(defense, draws=1000, stream=stream)]
    assert len(audits) == 100
    assert [str(each) for each in audits if not each.holds] == []


def test_noise_that_is_used_again_is_refuted_by_alternating_inputs_alone() -> None:
    found = by_inputs(audit(Reuses(sigma=2.0, clip=1.0), draws=20_000))
    assert found["equal"].holds
    assert not found["alternating"].holds
    assert "REFUTED" in str(found["alternating"])


def test_noise_that_is_too_small_is_refuted() -> None:
    found = by_inputs(audit(Quiet(sigma=2.0, clip=1.0)))
    assert not found["equal"].holds
    assert not found["alternating"].holds


def test_noise_that_is_not_normal_is_judged_by_rates_alone() -> None:
    for found in audit(OfLaplace(clip=1.0)):
        assert found.holds, str(found)
        assert found.claimed == 2.0  # of two messages
        assert found.found > 0.6 * found.claimed
    assert not any(found.holds for found in audit(OfLaplace(clip=1.0, worth=1.5)))


@dataclass(frozen=True, kw_only=True)
class Boasts(LabelDP):
    """Claims for the published form what holds for the corrected one."""

    claiming = True  # type: ignore[assignment]


def test_the_published_form_of_label_dp_has_no_epsilon() -> None:
    prior = (0.9, 0.05, 0.05)
    (found,) = audit(Boasts(mechanism="rr-with-prior", prior=prior, form="published"))
    assert not found.holds
    assert found.found > 5
    (corrected,) = audit(LabelDP(mechanism="rr-with-prior", prior=prior))
    assert corrected.holds


def test_a_sample_that_is_twice_in_a_batch_exceeds_what_dp_sgd_claims() -> None:
    defense = DPSGD(epsilon=4.0, rate=1.0, steps=1)

    def scores(times: int, *, stream: int) -> Tensor:
        rows = torch.zeros(4, 2)
        rows[:times, 0] = 1e4
        states = [DefenseState(stream=stream + draw) for draw in range(4000)]
        sent = [defense.protect_weight_gradients(each, {"w": rows})[1]["w"][0] for each in states]
        return torch.stack(sent)

    absent = scores(0, stream=0)
    assert 0.5 < certain(scores(1, stream=10_000), absent, delta=1e-5) <= 4.0
    assert certain(scores(2, stream=20_000), absent, delta=1e-5) > 4.0


def test_compression_over_the_batch_before_noise_lets_one_row_move_others() -> None:
    """Which is why the harness refuses it; ranked within each row, the claim holds."""
    noise, others = DPCutGradient(epsilon=1.0), 31
    entries = 1 + others
    dense, sparse = torch.zeros(2, 1 + others, entries)
    dense[:, 0] = sparse[:, 0] = 10.0  # what the other rows would send, if there is room
    dense[0], sparse[0] = 1e4, 0.0
    sparse[0, 0] = -1e4  # one entry, and so the other rows send theirs

    def found(per: str) -> float:
        before = GradientCompression(per=per, ratio=1 / entries)
        pair = []
        for start, rows in ((0, dense), (10_000, sparse)):
            given = before.protect_cut_gradient(DefenseState(stream=0), rows)[1]  # draws nothing
            states = [DefenseState(stream=start + draw) for draw in range(4000)]
            sent = [noise.protect_cut_gradient(each, given)[1] for each in states]
            pair.append(torch.stack(sent).flatten(1))
        laws = [sent_law([before, noise], clean(rows)) for rows in (dense, sparse)]
        means = [law.mean[Protects.CUT_GRADIENT] for law in laws if isinstance(law, Normal)]
        line = (means[0] - means[1]).flatten()
        return certain(pair[0] @ line, pair[1] @ line, delta=noise.delta)

    assert found("sample") <= 1.0
    assert found("batch") > 1.0


def clean(rows: Tensor) -> Clean:
    return Clean(kind=Protects.CUT_GRADIENT, arrays={Protects.CUT_GRADIENT: rows})


def test_what_claims_nothing_is_not_audited() -> None:
    published = LabelDP(mechanism="rr-with-prior", prior=(0.9, 0.1), form="published")
    counted = LabelDP(mechanism="rr-with-prior")
    for silent in (IsoNoise(), SmashedNoise(), WeightNoise(), published, counted):
        with pytest.raises(NoAuditError, match="claims no differential privacy"):
            audit(silent)
    with pytest.raises(NoAuditError, match="is no message"):
        audit(DPSGD())


def test_epsilon_and_mu_are_each_others_inverse() -> None:
    for epsilon in (0.5, 1.0, 8.0, 48.0):
        mu = mu_of(epsilon, delta=1e-5)
        assert epsilon_of(mu, delta=1e-5) == pytest.approx(epsilon, rel=1e-6)
    assert epsilon_of(0.0, delta=1e-5) == 0.0
    assert epsilon_of(float("inf"), delta=1e-5) == float("inf")
    assert mu_of(8.0, delta=1e-5) > mu_of(1.0, delta=1e-5)
    assert torch.isfinite(torch.tensor(mu_of(50.0, delta=1e-5)))
