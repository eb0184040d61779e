"""The rules of update defences: the catalogue's bits as before, and the same rule in numpy."""

import inspect
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from defenses import LocalDP, WeightNoise, WeightSparsification
from leakbed import mods
from leakbed.contracts import Defense
from leakbed.seeds import derive
from leakbed.tensors import TENSORS
from leakbed.update_defenses import NUMPY, Budget, InNumpy, Noising, Sparsifying
from leakbed.wire.records import pack, unpack

pytestmark = pytest.mark.usefixtures("identity")

ROOT = Path(__file__).parents[2]
SHAPES = {"conv.weight": (4, 3, 5, 5), "conv.bias": (4,), "norm.running_var": (4,), "scale": ()}


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    made = {k: torch.randn(shape, generator=drawn).to(dtype) for k, shape in SHAPES.items()}
    return {**made, "norm.num_batches_tracked": torch.tensor(seed)}


def noised(defense: WeightNoise, before: Tensor, after: Tensor, draws: torch.Generator) -> Tensor:
    """The published form as the catalogue's class had it until the rules were shared."""

    def draw(like: Tensor) -> Tensor:
        if defense.distribution == "normal":
            noise = torch.randn(like.shape, generator=draws)
        else:
            uniform = torch.rand(like.shape, generator=draws).clamp_min(1e-7) - 0.5
            noise = -uniform.sign() * torch.log1p(-2 * uniform.abs())
        return (defense.scale * noise).to(like)

    def factor(weight: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(weight, dim=1 if weight.dim() > 1 else None)
        return (norms.max() / 0.2).clamp_min(1.0)

    noise = [factor(each) * draw(each) for each in (before, after)]
    return after + noise[1] - noise[0]


def corrected(defense: WeightNoise, before: Tensor, move: Tensor, norm: Tensor) -> Tensor:
    return before + move * (defense.clip / norm.clamp_min(1e-12)).clamp_max(1.0)


def sparsified(defense: WeightSparsification, before: Tensor, after: Tensor) -> Tensor:
    """Both forms as they were."""
    if defense.form == "corrected":
        return torch.where(TENSORS.kept(after - before, defense.ratio), after, before)
    zero = torch.zeros_like(after)
    above = torch.where(TENSORS.kept(after, defense.ratio), after, zero)
    return torch.where(TENSORS.kept(before, defense.ratio), zero, before) + above


def literal(defense: Any, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Any:
    """What the catalogue's classes sent until the rules were shared (2026-11-29)."""
    moves = {k: v - before[k] for k, v in after.items() if v.is_floating_point()}
    sent = dict(after)
    if isinstance(defense, WeightSparsification):
        return sent | {k: sparsified(defense, before[k], after[k]) for k in moves}
    draws = defense.begin(3).generator()
    if defense.form == "published":
        sent |= {k: noised(defense, before[k], after[k], draws) for k in moves}
    else:
        norm = torch.linalg.vector_norm(
            torch.stack([*map(torch.linalg.vector_norm, moves.values())])
        )
        for name, move in moves.items():
            clipped = corrected(defense, before[name], move, norm)
            drawn = torch.randn(clipped.shape, generator=draws)
            sent[name] = clipped + defense.clip * (defense.scale * drawn).to(clipped)
    if defense.scale:
        sent["norm.running_var"] = sent["norm.running_var"].clamp_min(0)
    return sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(
    "defense",
    [
        WeightNoise(scale=0.3),
        WeightNoise(scale=0.3, distribution="laplace"),
        WeightNoise(scale=0.0),
        WeightNoise(scale=0.3, form="corrected", clip=2.0),
        WeightNoise(scale=0.3, form="corrected", clip=1000.0),
        WeightSparsification(ratio=0.3),
        WeightSparsification(ratio=0.3, form="corrected"),
    ],
    ids=repr,
)
def test_the_catalogue_sends_the_bits_it_always_sent(defense: Defense, dtype: torch.dtype) -> None:
    before, after = weights(1, dtype), weights(2, dtype)
    _, sent = defense.protect_update(defense.begin(3), before, after)
    expected = literal(defense, before, after)
    assert list(sent) == list(after)
    for name, value in sent.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize(
    "rule",
    [
        Noising(scale=0.3),
        Noising(scale=0.3, form="corrected", clip=2.0),
        Budget(epsilon=4.0, clip=3.0).noising,
        Sparsifying(ratio=0.3),
        Sparsifying(ratio=0.3, form="corrected"),
    ],
    ids=repr,
)
def test_numpy_computes_what_torch_does(rule: Any) -> None:
    before, after = weights(1, torch.float64), weights(2, torch.float64)
    arrays = [{k: v.numpy() for k, v in each.items()} for each in (before, after)]
    drawn = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def draw(like: Any) -> Any:
        made = drawn[: 1 + int(np.prod(like.shape)) % 99].sum().expand(like.shape)
        return made if isinstance(like, Tensor) else made.numpy()

    noise = {"draw": draw} if isinstance(rule, Noising) else {}
    in_torch = rule.sent(before, after, numbers=TENSORS, **noise)
    in_numpy = rule.sent(*arrays, numbers=NUMPY, **noise)
    assert list(in_numpy) == list(in_torch)
    for name, value in in_torch.items():
        np.testing.assert_allclose(in_numpy[name], value.numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (mods.local_dp, LocalDP),
        (mods.weight_noise, WeightNoise),
        (mods.weight_sparsification, WeightSparsification),
    ],
)
def test_a_mod_takes_the_settings_of_the_catalogue_s_class(made: Any, kind: Any) -> None:
    own = {key: each.default for key, each in inspect.signature(made).parameters.items()}
    own.pop("stream", None)
    assert own == {each.name: each.default for each in fields(kind)}


def context(node: int = 1, **config: int) -> Context:
    named: Any = {key.replace("_", "-"): value for key, value in config.items()}
    return Context(run_id=1, node_id=node, node_config=named, state=RecordDict(), run_config={})


def sent_by(mod: Any, kept: Context, arrays: Mapping[str, Any], **beside: Any) -> RecordDict:
    """Return what a client sends that returns its weights one larger."""

    def handler(message: Message, context: Context) -> Message:
        given = unpack(message.content.array_records["arrays"])
        content = {"arrays": pack({k: v + np.ones_like(v) for k, v in given.items()}), **beside}
        return Message(RecordDict(content), reply_to=message)

    message = Message(RecordDict({"arrays": pack(arrays)}), dst_node_id=1, message_type="train")
    answer: Message = mod(message, kept, handler)
    return answer.content


def test_a_mod_clips_and_noises_what_its_settings_say() -> None:
    zeros = {"w": np.zeros((40, 50), np.float32), "count": np.array(3)}
    loss = MetricRecord({"num-examples": 4, "train_loss": 0.5})
    mod = mods.weight_noise(form="corrected", scale=0.5, clip=2.0, stream=7)
    content = sent_by(mod, context(), zeros, metrics=loss)
    sent = unpack(content.array_records["arrays"])
    assert sent["w"].dtype == np.float32
    assert sent["count"] == 4
    assert sent["w"].std() == pytest.approx(1.0, rel=0.06)  # 2,000 entries: 1.6 % is one error
    assert sent["w"].mean() == pytest.approx(2.0 / np.sqrt(2000), abs=0.09)
    assert dict(content["metrics"]) == {"num-examples": 4}  # a loss in the clear names the batch
    alone = unpack(sent_by(mods.local_dp(sensitivity=0.0, stream=7), context(), zeros)["arrays"])  # type: ignore[arg-type]
    assert np.linalg.norm(alone["w"]) == pytest.approx(1.0)
    half = unpack(sent_by(mods.weight_sparsification(), context(), zeros)["arrays"])  # type: ignore[arg-type]
    assert np.array_equal(half["w"], np.ones((40, 50)))  # ties at the threshold stay


def test_laplace_noise_has_its_own_spread_and_a_factor_per_tensor() -> None:
    kept = context()
    mod = mods.weight_noise(scale=0.1, distribution="laplace", stream=7)
    zeros = {"w": np.full((100, 100), 0.2, np.float32)}  # its rows have norm 2: a factor of 10
    noise = unpack(sent_by(mod, kept, zeros)["arrays"])["w"] - 1.2  # type: ignore[arg-type]
    # after: rows of norm 12, a factor of 60; a Laplace variable of scale b has variance 2 b ** 2
    assert noise.std() == pytest.approx(np.sqrt(2) * 0.1 * np.hypot(10, 60), rel=0.05)


def test_every_message_of_every_node_has_noise_of_its_own() -> None:
    mod = mods.weight_noise(scale=1.0, stream=7)
    nodes = [context(1), context(2), context(1, partition_id=1)]
    zeros = {"w": np.zeros((40, 50), np.float32)}
    sent = [unpack(sent_by(mod, node, zeros)["arrays"])["w"] for node in (*nodes, nodes[0])]  # type: ignore[arg-type]
    alike = np.corrcoef(np.reshape(sent, (4, -1))) - np.eye(4)
    assert np.abs(alike).max() < 0.12  # 2,000 entries: a standard error of 0.022
    again = unpack(sent_by(mod, context(1), zeros)["arrays"])["w"]  # type: ignore[arg-type]
    assert np.array_equal(again, sent[0])
    state: Any = nodes[0].state.config_records["leakbed.defence.0.0"]
    assert isinstance(state, ConfigRecord)
    assert (state["messages"], state["stream"]) == (2, derive(7, "run/1/node/1/"))


@pytest.mark.parametrize(
    ("made", "wrong"),
    [
        (mods.local_dp, {"epsilon": 0.0, "stream": 1}),
        (mods.weight_noise, {"form": "own", "stream": 1}),
        (mods.weight_sparsification, {"ratio": 1.0}),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(made: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"epsilon > 0|unknown form|ratio < 1"):
        made(**wrong)


DRIVEN = """
import sys
for name in ("torch", "jaxtyping", "beartype", "pydantic", "scipy", "ray", "defenses"):
    sys.modules[name] = None  # as where only the light wheel is installed
{shown}
import numpy as np
from flwr.serverapp.strategy import FedAvg
from leakbed.events import UpdateUp
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from leakbed.tap import Wiretap
from leakbed.mods import weight_noise, weight_sparsification
seen = []
with task_identity():
    tap = Wiretap(LocalGrid(app, nodes=2), [seen.append])
    FedAvg(fraction_evaluate=0.0).start(tap, ArrayRecord([np.ones((40, 50))]), num_rounds=1)
ups = [event for event in seen if isinstance(event, UpdateUp)]
moves = [event.after["0"] - event.before["0"] for event in ups]
assert [event.train_loss for event in ups] == [None, None], ups
print(*(float(move.std()) for move in moves), float(np.corrcoef([m.ravel() for m in moves])[0, 1]))
"""


def test_the_documented_client_runs_where_no_torch_is_installed() -> None:
    page = (ROOT / "docs" / "update-defenses.md").read_text()
    (shown,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run(  # noqa: S603  our own page
        [sys.executable, "-c", DRIVEN.replace("{shown}", shown)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, other, alike = map(float, done.stdout.split())
    deviation = Budget(epsilon=8.0).deviation
    assert (one, other) == (pytest.approx(deviation, rel=0.06), pytest.approx(deviation, rel=0.06))
    assert abs(alike) < 0.12


def test_a_rule_in_numpy_says_whether_it_claims_anything() -> None:
    claiming = [Noising(form="corrected"), Budget(sensitivity=0.0).noising, Sparsifying()]
    assert [InNumpy(rule=rule).claiming for rule in claiming] == [True, False, False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", [Budget().noising, Budget(sensitivity=0.0).noising], ids=repr)
def test_an_update_that_is_not_finite_is_refused_and_not_sent_unclipped(
    rule: Noising, bad: float
) -> None:
    before = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}
    after = {"w": np.full((2, 3), 100.0, np.float32), "b": np.array([1.0, bad, 1.0], np.float32)}
    told = r"the update of 'b' is not finite, so it cannot be clipped"
    with pytest.raises(ValueError, match=told):
        InNumpy(rule=rule).protect_update(InNumpy(rule=rule).begin(3), before, after)  # type: ignore[arg-type]
    for defense in (LocalDP(), WeightNoise(form="corrected")):
        with pytest.raises(ValueError, match=told):
            defense.protect_update(
                defense.begin(3),
                {name: torch.from_numpy(value) for name, value in before.items()},
                {name: torch.from_numpy(value) for name, value in after.items()},
            )
