"""A malicious client beside a slow reading: one uncut network, one generator, no messages."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.building_blocks.gan_networks import network as image_generator
from attacks.client_gan import ClientGan
from clients.malicious import MaliciousClientSession, begun, intruder_of, unlabelling, view_of
from clients.node import OutOfStepError
from leakbed.contracts.attack import CraftedBatch, MaliciousClientState
from leakbed.seeds import derive, generator, scoped
from tests.support import intruded, tiny, u_shaped
from tests.support.intruded import DUMMY, OWN, STREAM, TARGET, samples, train

pytestmark = pytest.mark.usefixtures("identity")

ROWS = 8  # of the tiny plan's batches
EPSILON = 1e-3


class Reading:
    """Algorithm 2 on one machine: an uncut network and a generator with an Adam of its own."""

    def __init__(self, rate: float = 0.1) -> None:
        with scoped(derive(STREAM, "generator")):
            self.generator = image_generator(tiny.IMAGE_SHAPE, OWN["latent"], OWN["width"])
        self.network = intruded.first_weights()
        own = self.generator.parameters()
        self.adam = torch.optim.Adam(own, lr=OWN["generator_rate"], eps=1e-7)  # Keras's epsilon
        self.rate = rate

    def images(self, role: str, count: int = ROWS) -> Tensor:
        noise = torch.randn(count, OWN["latent"], generator=generator(derive(STREAM, role)))
        made: Tensor = self.generator(noise)
        return made

    def generator_turn(self, turn: int) -> dict[str, Tensor]:
        """Train the generator; return what the loss says of the network, which stays as it is."""
        self.network.zero_grad()
        loss = self.loss(self.images(f"noise/{turn}"), TARGET)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return {n: torch.as_tensor(p.grad).clone() for n, p in self.network.named_parameters()}

    def poisoning_turn(self, turn: int) -> None:
        self.network.zero_grad()
        self.loss(self.images(f"noise/{turn}").detach(), DUMMY).backward()
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.sub_(self.rate * torch.as_tensor(parameter.grad))

    def loss(self, images: Tensor, label: int) -> Tensor:
        labels = torch.full((len(images),), label)
        return nn.functional.cross_entropy(self.network(images), labels)


def alone(own: dict[str, Any], **more: Any) -> tuple[dict[str, Tensor], Any]:
    """Train with the malicious node and no other."""
    return train(own, nodes=1, **more)


def parted(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the server's weights and the node's."""
    middle = set(intruded.network().middle(0).state_dict())
    server = {name: value for name, value in weights.items() if name in middle}
    return server, {name: value for name, value in weights.items() if name not in middle}


def test_in_a_generator_turn_the_server_moves_by_epsilon_and_the_node_not_at_all() -> None:
    weights, _ = alone({"epsilon": EPSILON}, local_steps=1)
    reading = Reading()
    before = {name: value.clone() for name, value in reading.network.state_dict().items()}
    gradients = reading.generator_turn(0)
    server, node = parted(weights)
    assert server
    assert node
    for name, value in server.items():
        moved = (before[name] - value) / 0.1
        torch.testing.assert_close(moved, EPSILON * gradients[name], rtol=1e-2, atol=1e-6)
        assert (before[name] - value).abs().max() < 2 * EPSILON * 0.1 * gradients[name].abs().max()
    assert tiny.same(node, {name: before[name] for name in node})


@pytest.mark.parametrize("epsilon", [1.0, 1e-3, 1e-5])
def test_the_generator_learns_what_it_would_from_the_uncut_model(epsilon: float) -> None:
    _, grid = alone({"epsilon": epsilon}, local_steps=1)
    reading = Reading()
    before = reading.images("samples", 6).detach()
    reading.generator_turn(0)
    found, turns = samples(grid)
    assert turns == 1
    torch.testing.assert_close(found, reading.images("samples", 6).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-4)


def test_a_poisoning_turn_is_an_ordinary_step_on_its_images_and_leaves_the_generator() -> None:
    weights, grid = alone({"epsilon": EPSILON, "generator_turns": 1}, local_steps=2)
    reading = Reading()
    gradients = reading.generator_turn(0)
    with torch.no_grad():
        for name, parameter in reading.network.named_parameters():
            if name in parted(weights)[0]:
                parameter.sub_(0.1 * EPSILON * gradients[name])
    held = reading.images("samples", 6).detach()
    reading.poisoning_turn(1)
    for name, value in reading.network.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(samples(grid)[0], held, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("optimizer", "weights"), [("adam", False), ("sgd", True)])
def test_one_process_and_many_give_the_same_numbers(optimizer: str, weights: bool) -> None:
    own = {"honest_turns": 1}
    plan = u_shaped.OPTIMISERS[optimizer] | {"local_steps": 4}
    many: dict[str, Any] = {"model": "everywhere", "rounds": 2, "weights": weights, **plan}
    kept, one = train(own, **many)
    forgotten, two = train(own, resident=False, **many)
    assert tiny.same(kept, forgotten)
    (shown, turns), (again, told) = samples(one), samples(two)
    assert turns == told
    assert torch.equal(shown, again)
    honest, _ = train(None, **many)
    assert not tiny.same(kept, honest)


def test_a_generator_turn_leaves_the_nodes_buffers_and_dropout_draws_as_ever() -> None:
    weights, _ = alone({}, model="everywhere", local_steps=1)
    before = intruded.first_weights("everywhere").state_dict()
    middle = set(intruded.network("everywhere").middle(0).state_dict())
    buffers = [name for name in before if "running" in name and name not in middle]
    assert len(buffers) == 4
    assert all(torch.equal(weights[name], before[name]) for name in buffers)


def test_by_fedavg_the_generator_is_trained_first_and_costs_no_step() -> None:
    own = {"generator_turns": 3, "poisoning_turns": 2}
    weights, grid = alone(own, weights=True, local_steps=2)
    reading = Reading()
    for turn in range(3):
        reading.generator_turn(turn)
    for turn in (3, 4):
        reading.poisoning_turn(turn)
    found, turns = samples(grid)
    assert turns == 5
    torch.testing.assert_close(found, reading.images("samples", 6).detach(), rtol=1e-4, atol=1e-5)
    for name, value in reading.network.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_an_honest_turn_trains_on_the_nodes_own_rows() -> None:
    """Generator, poison, honest, generator: the third batch is the honest run's third."""
    own = {"generator_turns": 1, "poisoning_turns": 0, "honest_turns": 9, "epsilon": 1e-30}
    weights, _ = alone(own, local_steps=3)
    network, plan = intruded.first_weights(), u_shaped.at_home(local_steps=3)
    cell = tiny.cell(plan=plan)
    images, labels = cell.rows()
    optimiser = plan.optimiser(network.parameters())
    for batch in cell.batches(1, len(images))[1:]:
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimiser.step()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [False, True])
def test_the_server_and_the_other_nodes_see_messages_as_ever(weights: bool) -> None:
    def active_channels(own: dict[str, Any] | None) -> list[Any]:
        ears: list[u_shaped.Ear] = []

        def around(grid: Any) -> Any:
            ears.append(u_shaped.Ear(grid))
            return ears[0]

        train(own, nodes=3, rounds=2, weights=weights, around=around)
        return [
            shape(message) for message in ears[0].active_channels if "query" not in kind(message)
        ]

    malicious, honest = active_channels({}), active_channels(None)
    assert len(honest) > 6
    assert malicious == honest


def kind(message: Any) -> str:
    return str(message.metadata.message_type)


def shape(message: Any) -> Any:
    """Everything of a message but its numbers."""
    about = message.metadata
    arrays = {
        key: [(name, array.dtype, tuple(array.shape)) for name, array in record.items()]
        for key, record in message.content.array_records.items()
    }
    others = {key: sorted(record) for key, record in message.content.metric_records.items()}
    return kind(message), about.src_node_id, about.dst_node_id, arrays, others


def test_where_labels_are_shared_the_server_gets_the_intruders() -> None:
    seen: list[Tensor] = []
    plan = tiny.plan(local_steps=2)
    grid = tiny.LocalGrid(tiny.node_app, nodes=1)
    own = {"epsilon": 1.0, "dummy_class": 2}
    intruded.set_up(grid, 1, own, plan=plan, architecture=tiny.architecture())
    strategy = tiny.split_strategy(settings=plan)
    train_ = strategy.part.train
    strategy.part.train = lambda s, y, of: (seen.append(y), train_(s, y, of))[1]  # type: ignore[assignment]
    tiny.train_split(grid, strategy, rounds=1)
    assert [each.tolist() for each in seen] == [[TARGET] * ROWS, [2] * ROWS]


@pytest.mark.parametrize(
    ("labels", "settings", "what"),
    [
        ("server", {"epsilon": 1.0}, "the server has them; use 'u-shaped', 'fedavg'"),
        ("server", {}, "the server has them"),
        ("shared", {}, "the server computes the loss; use 'u-shaped' or 'fedavg', or set epsilon"),
    ],
)
def test_protocols_that_leave_it_no_say_are_named(
    labels: str, settings: dict[str, Any], what: str
) -> None:
    why = unlabelling(ClientGan(**settings), labels)
    assert why is not None
    assert "client-gan" in why
    assert what in why


def test_protocols_that_leave_it_its_labels_fit() -> None:
    assert unlabelling(ClientGan(), "client") is None
    assert unlabelling(ClientGan(epsilon=1.0), "shared") is None


def test_an_honest_node_has_no_intrusion_and_no_samples() -> None:
    assert intruder_of(tiny.cell()) is None
    assert MaliciousClientSession.of(tiny.cell()) is None
    grid = tiny.ready()
    with pytest.raises(AssertionError, match="node 0 is honest"):
        samples(grid)


def test_nothing_is_learned_from_a_batch_that_was_never_made() -> None:
    cell = tiny.cell(architecture=intruded.network(), intruder=("client-gan", OWN))
    intrusion = MaliciousClientSession.of(cell)
    assert intrusion is not None
    with pytest.raises(OutOfStepError, match="a batch that it chose"):
        intrusion._learn(None)


def test_the_intruder_knows_shapes_and_counts_only() -> None:
    view = view_of(tiny.cell(architecture=intruded.network()))
    assert vars(view) == vars(intruded.view())


class Careless(ClientGan):
    """Draws everything from the global generator."""

    def begin(self, view: Any, *, seed: int) -> MaliciousClientState:
        return MaliciousClientState(stream=seed, tensors={"first": torch.rand(1)})

    def turn(self, view: Any, state: MaliciousClientState, *, rows: int) -> CraftedBatch:
        images = state.tensors["first"] * torch.rand(rows, *view.image_shape)
        return CraftedBatch(images=images, labels=torch.randint(0, 3, (rows,)))

    def learn(
        self, state: MaliciousClientState, turn: CraftedBatch, gradient: Any
    ) -> MaliciousClientState:
        return replace(state, turns=state.turns + 1, tensors={"first": torch.rand(1)})

    def samples(self, view: Any, state: MaliciousClientState, *, count: int) -> Tensor:
        return torch.rand(count, *view.image_shape)


def test_an_intruder_that_draws_from_the_global_generators_is_the_same_again() -> None:
    def drawn(*, ambient: int, stream: int = STREAM) -> list[Tensor]:
        torch.manual_seed(ambient)
        before = torch.get_rng_state()
        intruder, view = Careless(**OWN), intruded.view()
        work = MaliciousClientSession(intruder, view, begun(intruder, view, seed=stream))
        found = [work.samples(2)]
        for _ in range(2):
            found += [torch.as_tensor(work.images(ROWS)), torch.as_tensor(work.labels(ROWS))]
            work._learn(None)
        assert torch.equal(torch.get_rng_state(), before)
        return found

    once, again, other = drawn(ambient=1), drawn(ambient=2), drawn(ambient=1, stream=STREAM + 1)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[1], once[3])
    assert not torch.equal(once[1], other[1])
