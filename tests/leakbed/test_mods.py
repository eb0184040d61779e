from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import (
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
)
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

import clients.split
from clients.node import one_torch_thread
from defenses import LocalDP, NoPeek, SmashedNoise, WeightNoise
from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.contracts.hooks import UncalledHookError
from leakbed.events import UpdateUp
from leakbed.grids import LocalGrid
from leakbed.mods import defend, local_dp, weight_sparsification
from leakbed.node_memory import load_state, save_state
from leakbed.tap.wiretap import Wiretap
from leakbed.wire.messages import EvaluateRequest, SplitReply, SplitRequest
from leakbed.wire.records import pack, unpack
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("identity")


X = np.arange(6, dtype=np.float32).reshape(2, 3)


@dataclass(frozen=True, kw_only=True)
class Remember(Defense):
    """Adds the sum of everything it saw before: a defence with state of its own."""

    name: ClassVar[str] = "remember"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.SMASHED})

    def protect_smashed(self, state: DefenseState, smashed: Tensor) -> tuple[DefenseState, Tensor]:
        before = state.tensors.get("sum", torch.zeros(()))
        tensors = {"sum": before + smashed.sum()}
        return replace(state, tensors=tensors), smashed + before


@dataclass(frozen=True, kw_only=True)
class Cut(Defense):
    name: ClassVar[str] = "cut"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.CUT_GRADIENT})


def context(node: int = 1, *, run: int = 1, **config: int) -> Context:
    named: Any = {key.replace("_", "-"): value for key, value in config.items()}
    return Context(run_id=run, node_id=node, node_config=named, state=RecordDict(), run_config={})


def call(mod: Any, message: Message, kept: Context, **reply: Any) -> Message:
    """Run one message through a mod and a handler that answers with the given records."""

    def handler(message: Message, context: Context) -> Message:
        return Message(RecordDict(reply), reply_to=message)

    answer: Message = mod(message, kept, handler)
    return answer


def train(arrays: Mapping[str, Any] | None = None, **records: Any) -> Message:
    content = {"arrays": pack(arrays or {"w": X})} | records
    return Message(RecordDict(content), dst_node_id=1, message_type="train")


def smash(mod: Any, kept: Context, smashed: Any = X, kind: str = "train.split") -> Any:
    request: Any = SplitRequest(round=1, step=0)
    if kind == "evaluate.split":
        request = EvaluateRequest(round=1, start=0, stop=2, bottom={"w": X})
    message = Message(request.records(), dst_node_id=1, message_type=kind)
    records = SplitReply(steps=1, examples=2, smashed=smashed, labels=np.array([4, 5])).records()
    reply = SplitReply.of(call(mod, message, kept, **dict(records)))
    assert reply.labels.tolist() == [4, 5]
    return reply.smashed


def test_every_message_of_a_node_gets_its_own_noise_and_the_same_again() -> None:
    mod = defend(SmashedNoise(sigma=1.0), stream=7)
    kept = context()
    noise = [smash(mod, kept) - X for _ in range(3)]
    assert not np.array_equal(noise[0], noise[1])
    assert not np.array_equal(noise[1], noise[2])
    again = context()  # the same node of the same run
    assert all(np.array_equal(smash(mod, again) - X, one) for one in noise)
    other = smash(defend(SmashedNoise(sigma=1.0), stream=8), context()) - X
    assert not np.array_equal(other, noise[0])


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param([context(node) for node in (1, 2, 3)], id="by Flower's node id"),
        pytest.param([context(1, partition_id=part) for part in (0, 1, 2)], id="by partition"),
        pytest.param([context(node, partition_id=0) for node in (1, 2)], id="of one partition"),
        pytest.param([context(run=run) for run in (1, 2)], id="in two runs"),
    ],
)
def test_no_two_nodes_of_one_process_share_their_noise(nodes: list[Context]) -> None:
    """Else a server subtracts one node's message from another's and has no noise left."""
    mod = defend(SmashedNoise(sigma=1.0), stream=7)
    noise = torch.tensor(np.stack([smash(mod, node, np.zeros((4, 500), "f")) for node in nodes]))
    alike = torch.corrcoef(noise.flatten(1)).fill_diagonal_(0.0)
    assert alike.abs().max() < 0.12  # 2,000 entries: a standard error of 0.022


def test_noise_differs_between_the_nodes_of_flowers_own_loop() -> None:
    """The app as the docstring shows it, under Flower's FedAvg, every node in this process."""
    app = ClientApp(mods=[defend(WeightNoise(scale=0.01, form="published"), stream=12345)])

    @app.train()
    def same(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1})
        arrays = message.content.array_records["arrays"]
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    seen: list[Any] = []
    tap = Wiretap(LocalGrid(app, nodes=3), [seen.append])
    FedAvg(fraction_evaluate=0.0).start(tap, ArrayRecord([np.ones((40, 50))]), num_rounds=2)
    ups = [event for event in seen if isinstance(event, UpdateUp)]
    noise = np.stack([up.after["0"] - up.before["0"] for up in ups]).reshape(len(ups), -1)
    alike = np.corrcoef(noise) - np.eye(len(ups))
    assert len(ups) == 6
    assert np.abs(alike).max() < 0.12  # 2,000 entries: a standard error of 0.022


def test_the_state_lives_in_the_context_and_holds_tensors() -> None:
    mod = defend(Remember(), stream=7)
    kept = context()
    assert np.array_equal(smash(mod, kept), X)
    assert np.array_equal(smash(mod, kept), X + 15)
    assert np.array_equal(smash(mod, kept), X + 30)
    assert kept.state["leakbed.defence.0.0"]["messages"] == 3
    assert unpack(kept.state["leakbed.defence.0.0.tensors"])["sum"] == 45


def test_updates_are_protected_and_integer_buffers_pass() -> None:
    weights = {"w": X, "count": np.array(3)}
    after = {"w": X + 1, "count": np.array(4)}
    mod = defend(WeightNoise(scale=0.5), stream=7)
    metrics = ConfigRecord({"kept": True})
    reply = call(mod, train(weights), context(), arrays=pack(after), m=metrics)
    sent = unpack(reply.content["arrays"])
    assert sent["count"] == 4
    assert (sent["count"].dtype, sent["count"].shape) == (after["count"].dtype, ())
    assert np.abs(sent["w"] - after["w"]).min() > 0
    assert reply.content["m"] == metrics


@pytest.mark.parametrize(
    ("defense", "left"),
    [
        (WeightNoise(scale=0.5), ["num-examples", "train_loss"]),
        (WeightNoise(scale=0.5, form="corrected"), ["num-examples"]),
        (LocalDP(), ["num-examples"]),
    ],
)
def test_a_claim_of_privacy_keeps_metrics_at_the_node(defense: Defense, left: list[str]) -> None:
    metrics = MetricRecord({"num-examples": 5, "train_loss": 0.3})
    old = {
        "fitres.num_examples": MetricRecord({"num_examples": 5}),
        "fitres.metrics": ConfigRecord({"loss": 0.3}),
        "fitres.status": ConfigRecord({"code": 0}),
    }
    mod, arrays = defend(defense, stream=7), pack({"w": X})
    reply = call(mod, train(), context(), arrays=arrays, m=metrics, **old).content
    assert list(reply["m"]) == left
    assert reply["fitres.num_examples"]["num_examples"] == 5
    assert list(reply["fitres.metrics"]) == (["loss"] if len(left) > 1 else [])
    assert reply["fitres.status"]["code"] == 0
    assert list(metrics) == ["num-examples", "train_loss"]  # the handler's own is as it was


def test_the_handlers_reply_and_the_message_are_not_changed_in_place() -> None:
    arrays = pack({"w": X + 1})
    message = train()
    call(defend(WeightNoise(scale=0.5), stream=7), message, context(), arrays=arrays)
    assert np.array_equal(unpack(arrays)["w"], X + 1)
    assert np.array_equal(unpack(message.content["arrays"])["w"], X)


def test_a_single_defense_needs_its_stream() -> None:
    with pytest.raises(ValueError, match=r"needs stream=\.\.\., the secret seed"):
        defend(SmashedNoise())


def test_defenses_are_looked_up_at_call_time_and_apply_in_order() -> None:
    chosen: list[Any] = [()]
    mod = defend(lambda _: (chosen[0], 7))
    kept = context()
    assert np.array_equal(smash(mod, kept), X)
    chosen[0] = (Remember(), Remember())
    assert np.array_equal(smash(mod, kept), X)
    # The first adds 15; the second saw 15, too, and adds it to what the first gives it.
    assert np.array_equal(smash(mod, kept), X + 30)


def test_stacked_defenses_draw_different_noise() -> None:
    one = smash(defend(SmashedNoise(sigma=1.0), stream=7), context()) - X
    twice = (SmashedNoise(sigma=1.0), SmashedNoise(sigma=1.0))
    both = smash(defend(lambda _: (twice, 7)), context()) - X
    assert not np.allclose(both, 2 * one)


def refusal(mod: Any, message: Message, **reply: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        call(mod, message, context(), **reply)
    assert type(caught.value).__name__ == "IllegalCombinationError"
    return str(caught.value)


def test_a_misfit_says_what_why_and_what_instead() -> None:
    said = refusal(defend(SmashedNoise(), stream=7), train(), arrays=pack({"w": X}))
    assert said == (
        "smashed-noise protects smashed messages but this app sends update; "
        "use a defence that protects update"
    )
    with pytest.raises(ValueError, match=r"weight-noise protects update .* use .* smashed"):
        smash(defend(WeightNoise(), stream=7), context())


def test_a_cut_gradient_is_the_label_holders_to_protect_and_fits_no_weights() -> None:
    def looked_up() -> Any:
        return defend(lambda _: ((Cut(),), 7))

    assert np.array_equal(smash(looked_up(), context()), X)
    assert "cut protects cut-gradient messages but this app sends update" in refusal(
        looked_up(), train(), arrays=pack({"w": X})
    )
    with pytest.raises(ValueError, match=r"cut protects the cut gradient, which the label holder"):
        defend(Cut(), stream=7)


def test_a_defense_that_the_mod_would_never_call_is_refused() -> None:
    body = {"name": "idle", "source": "nowhere", "protects": frozenset({Protects.SMASHED})}
    with pytest.raises(UncalledHookError, match="idle protects smashed but overrides no hook"):
        defend(type("Idle", (Defense,), body)(), stream=7)


@pytest.mark.parametrize("what", [Protects.LABELS, Protects.TOP])
def test_what_a_party_trains_with_is_nothing_a_mod_sees(what: Protects) -> None:
    defense = type("Held", (Cut,), {"name": "held", "protects": frozenset({what})})()
    with pytest.raises(ValueError, match="held changes what a party trains with"):
        smash(defend(defense, stream=7), context())


def test_a_hook_into_training_is_refused_where_nobody_calls_it() -> None:
    said = refusal(defend(NoPeek(), stream=7), train(), arrays=pack({"w": X}))
    assert "nopeek hooks into the node's own training step, which a mod never sees" in said
    assert "use it in an app built on Leakbed's clients" in said
    with pytest.raises(ValueError, match="nopeek hooks into"):
        smash(defend(NoPeek(), stream=7), context())


def test_a_state_survives_storage_alarm_and_all() -> None:
    kept, tensors = context(), {"a": torch.arange(3), "b": torch.tensor(True)}
    state = DefenseState(
        stream=2**62, messages=4, tensors=tensors, alarm=3, score=0.25, last=0.5, probing=True
    )
    save_state(kept, "here", state)
    found = load_state(kept, "here")
    assert found is not None
    assert vars(found) | {"tensors": None} == vars(state) | {"tensors": None}
    assert all(torch.equal(found.tensors[name], value) for name, value in tensors.items())
    assert load_state(kept, "there") is None


def test_weights_the_mod_cannot_read_are_refused_and_not_sent_unprotected() -> None:
    mod, arrays = defend(WeightNoise(), stream=7), pack({"w": X})
    assert "reads one ArrayRecord each way" in refusal(mod, train(), a=arrays, b=arrays)
    assert "reads one ArrayRecord each way" in refusal(mod, train(more=arrays), arrays=arrays)
    assert "needs the same arrays each way" in refusal(mod, train(), arrays=pack({"v": X}))
    assert "needs the same arrays each way" in refusal(mod, train(), arrays=pack({"w": X.T}))


@pytest.mark.parametrize("kind", ["query", "evaluate", "train"])
def test_messages_without_weights_pass(kind: str) -> None:
    message = Message(RecordDict(), dst_node_id=1, message_type=kind)
    kept = context()
    reply = call(defend(WeightNoise(), stream=7), message, kept, m=ConfigRecord({"a": 1}))
    assert reply.content["m"]["a"] == 1
    assert dict(kept.state) == {}


def test_errors_and_closing_replies_pass() -> None:
    mod = defend(SmashedNoise(), stream=7)
    message = Message(SplitRequest(round=1, step=1).records(), dst_node_id=1, message_type="train")
    error = mod(message, context(), lambda m, c: Message(Error(0, "no"), reply_to=m))
    assert error.error.reason == "no"
    request = SplitRequest(round=1, step=1, gradient=X)
    closing = Message(request.records(), dst_node_id=1, message_type="train.split")
    records = SplitReply(steps=1, examples=2, bottom={"w": X}).records()
    reply = SplitReply.of(call(mod, closing, context(), **dict(records)))
    assert np.array_equal(reply.bottom["w"], X)


def test_a_cells_defenses_protect_what_its_node_sends() -> None:
    def trained(**settings: Any) -> Any:
        grid = tiny.ready(plan=tiny.plan(), **settings)
        return tiny.train_split(grid, tiny.split_strategy(settings=tiny.plan()))

    noisy = {"defenses": (("smashed-noise", {"sigma": 0.5}),)}
    assert tiny.same(trained(**noisy), trained(**noisy))
    assert tiny.same(trained(**noisy), trained(**noisy, resident=False))
    assert not tiny.same(trained(**noisy), trained())
    assert not tiny.same(trained(**noisy), trained(**noisy, defense_stream=3))


@pytest.mark.parametrize(
    "mod", [LocalDpMod(1.0, 1.0, 1.0, 1e-5), fixedclipping_mod, adaptiveclipping_mod]
)
def test_flowers_privacy_mods_are_refused_on_split_messages(mod: Any) -> None:
    told = r"(LocalDpMod|clipping_mod) clips and noises .* smashed data minus the gradient of other"
    app = ClientApp(mods=[one_torch_thread, mod])
    with pytest.raises(ValueError, match=told):
        clients.split.register(app)
    clients.split.register(ClientApp(mods=[one_torch_thread, arrays_size_mod]))


def stacked(mods: Sequence[Any], handler: Any) -> Any:
    """Return a handler with mods around it, the first outermost, as Flower stacks them."""
    for mod in reversed(mods):
        handler = partial(mod, call_next=handler)
    return handler


def one_larger(message: Message, context: Context) -> Message:
    given = unpack(message.content.array_records["arrays"])
    return Message(RecordDict({"arrays": pack({"w": given["w"] + 1})}), reply_to=message)


def test_a_mod_draws_from_its_own_secret_whatever_mod_stands_beside_it() -> None:
    def sent(secret: int, beside: Sequence[Any], *, inside: bool) -> Any:
        own = [local_dp(stream=secret)]
        app, kept = stacked([*own, *beside] if inside else [*beside, *own], one_larger), context()
        return [unpack(app(train(), kept).content["arrays"])["w"] for _ in range(2)]

    for inside in (True, False):
        for beside in ([weight_sparsification(ratio=0.0)], [local_dp(stream=5)]):
            one, other = (sent(secret, beside, inside=inside) for secret in (111, 222))
            assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_two_mods_of_one_secret_draw_other_noise() -> None:
    """Else the server would be rid of one's noise by the other's."""

    def noise(mods: int) -> Any:
        own = [local_dp(stream=5, clip=1e6, sensitivity=1.0) for _ in range(mods)]
        sent = unpack(stacked(own, one_larger)(train(), context()).content["arrays"])["w"]
        return sent - unpack(train().content.array_records["arrays"])["w"] - 1

    assert not np.allclose(noise(2), 2 * noise(1), rtol=1e-3)


def test_a_state_of_another_stream_goes_on_with_the_mod_s_own() -> None:
    """Where each message meets a fresh process, which draws a secret of its own."""
    kept, alone = context(), context()
    smash(defend(SmashedNoise(sigma=1.0), stream=7), kept)
    noise = smash(defend(SmashedNoise(sigma=1.0), stream=8), kept) - X
    own = [smash(defend(SmashedNoise(sigma=1.0), stream=8), alone) - X for _ in range(2)]
    assert np.array_equal(noise, own[1])


def test_a_stream_that_a_defence_moved_on_stays_moved() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Ratchet(Remember):
        def protect_smashed(self, state: DefenseState, smashed: Any) -> tuple[DefenseState, Any]:
            return replace(state, stream=2 * state.stream), smashed

    mod, kept = defend(lambda _: ((Ratchet(),), 7)), context()
    for _ in range(3):
        smash(mod, kept)
    state = load_state(kept, "leakbed.defence.0.0")
    assert state is not None
    assert state.stream == 8 * 7


def test_stacked_mods_do_not_mix_their_states() -> None:
    kept, mods = context(), [defend(Remember(), stream=7), defend(Remember(), stream=7)]

    def handler(message: Message, context: Context) -> Message:
        reply = SplitReply(steps=1, examples=2, smashed=X, labels=np.array([4, 5]))
        return Message(reply.records(), reply_to=message)

    app = stacked(mods, handler)
    message = Message(
        SplitRequest(round=1, step=0).records(), dst_node_id=1, message_type="train.split"
    )
    sent = [SplitReply.of(app(message, kept)).smashed for _ in range(2)]
    assert np.array_equal(sent[0], X)
    assert np.array_equal(sent[1], X + 30)  # as two defences of one mod


@dataclass(frozen=True, kw_only=True)
class Times(Defense):
    """Multiplies smashed data, so that the gradient tells through which defences it passed."""

    by: float
    name: ClassVar[str] = "times"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.SMASHED})

    def protect_smashed(self, state: DefenseState, smashed: Tensor) -> tuple[DefenseState, Tensor]:
        return state, self.by * smashed


@pytest.mark.parametrize("sticky", [True, False])
def test_a_gradient_goes_back_through_both_of_two_mods(sticky: bool) -> None:
    kept: Any = context()
    if sticky:
        kept.live = {}
    seen: list[Any] = []

    def handler(message: Message, context: Context) -> Message:
        seen.append(SplitRequest.of(message).gradient)
        reply = SplitReply(steps=1, examples=2, smashed=X, labels=np.array([4, 5]))
        return Message(reply.records(), reply_to=message)

    app = stacked([defend(Times(by=3.0), stream=7), defend(Times(by=5.0), stream=7)], handler)
    for request in (
        SplitRequest(round=1, step=0),
        SplitRequest(round=1, step=1, gradient=np.ones_like(X)),
    ):
        app(Message(request.records(), dst_node_id=1, message_type="train.split"), kept)
    assert np.array_equal(seen[1], 15 * np.ones_like(X))


@pytest.mark.parametrize("kind", ["train.own", "train.split", "train.head", "train.backward"])
@pytest.mark.parametrize("own", [{}, {"own": ConfigRecord({"class": "nobody:Imported"})}])
def test_an_app_whose_action_is_named_as_ours_is_defended_too(kind: str, own: Any) -> None:
    message = Message(
        RecordDict({"arrays": pack({"w": X}), **own}), dst_node_id=1, message_type=kind
    )
    mod = local_dp(stream=7, epsilon=1e6)  # noise of 5e-6
    metrics = MetricRecord({"num-examples": 4, "train_loss": 0.5})
    reply = call(mod, message, context(), arrays=pack({"w": X + 100}), m=metrics)
    assert np.linalg.norm(unpack(reply.content["arrays"])["w"] - X) == pytest.approx(1.0, rel=1e-3)
    assert list(reply.content["m"]) == ["num-examples"]
