"""Networks as strangers write them, cut where a path says."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from leakbed.models import Architecture, IllegalCutError, cut, flat, halves, join
from leakbed.models.chains import chained
from leakbed.models.cutting import check_stages
from leakbed.seeds import scoped
from tests.support.strange_networks import Nested

SHAPE = (1, 6, 6)


class Template(nn.Module):
    """As Flower's own template: layers that run twice, and code between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(4, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        images = self.pool(functional.relu(self.conv1(images)))
        images = self.pool(functional.relu(self.norm(self.conv2(images))))
        images = images.view(images.size(0), -1)
        images = functional.dropout(self.fc1(images), 0.5, training=self.training)
        scores: Tensor = self.fc2(images)
        return scores


class Listed(nn.Module):
    """Its layers stand in a list, with code between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, 3)])

    def forward(self, images: Tensor) -> Tensor:
        rows = images.flatten(1)
        for layer in self.layers:
            rows = torch.tanh(layer(rows))
        return rows


class Recurrent(nn.Module):
    """One layer with weights runs three times; the last layer has those of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(36, 8), nn.Linear(8, 8)
        self.back, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.back.weight

    def forward(self, images: Tensor) -> Tensor:
        rows = torch.relu(self.first(images.flatten(1)))
        for _ in range(3):
            rows = torch.relu(self.again(rows))
        return self.last(torch.relu(self.back(rows)))[:, :3]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat, self.one, self.two = nn.Flatten(), nn.Linear(36, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.one(self.flat(images))
        out: Tensor = self.last(rows + self.two(rows))
        return out


class TwoInputs(Residual):
    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.last(self.two(self.one(self.flat(images) * mask)))
        return out


class Deciding(Residual):
    def forward(self, images: Tensor) -> Tensor:
        rows = self.one(self.flat(images))
        rows = self.two(rows) if rows.sum() > 0 else rows
        out: Tensor = self.last(rows)
        return out


class Scaling(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.last(self.two(self.one(self.flat(images)) * self.scale))
        return out


class Unused(Residual):
    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.last(self.one(self.flat(images)))
        return out


class Ignoring(Residual):
    def forward(self, images: Tensor) -> Tensor:
        rows = self.one(self.flat(images))
        self.two(rows)
        out: Tensor = self.last(rows)
        return out


class OtherInTraining(Residual):
    def forward(self, images: Tensor) -> Tensor:
        rows = self.one(self.flat(images))
        out: Tensor = self.last(self.two(rows) if self.training else rows)
        return out


class Interleaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(36, 8), nn.Linear(8, 3)])
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(3)])

    def forward(self, images: Tensor) -> Tensor:
        rows = images.flatten(1)
        for linear, norm in zip(self.linears, self.norms, strict=True):
            rows = norm(linear(rows))
        return rows


def at(network: type[nn.Module], path: str) -> Architecture:
    name = f"{network.__module__}:{network.__name__}"
    return Architecture(name=name, image_shape=SHAPE, num_classes=3, cut=path)


PATHS = [
    *((Template, path) for path in ("conv1", "conv2", "norm", "fc1")),
    *((Nested, f"features.{index}") for index in range(4)),
    *((Nested, path) for path in ("features", "classifier.0", "classifier.2", "classifier")),
    *((Listed, f"layers.{index}") for index in range(3)),
    *((Recurrent, path) for path in ("first",)),
]


@pytest.mark.parametrize(
    ("network", "path"), PATHS, ids=lambda each: getattr(each, "__name__", each)
)
@pytest.mark.parametrize("training", [False, True])
def test_both_parts_one_after_the_other_are_the_network(
    network: type[nn.Module], path: str, training: bool
) -> None:
    """To the last bit, in outputs, gradients and the counts that BatchNorm keeps."""
    architecture = at(network, path)
    with scoped(3):
        own = network()
    written = own.state_dict()
    parts = architecture.parts(3)
    names = {**parts.bottom.state_dict(), **parts.top.state_dict()}
    assert set(names) == set(written)
    assert not set(parts.bottom.state_dict()) & set(parts.top.state_dict())
    assert set(architecture.build(3).state_dict()) == set(written)
    images = torch.rand(4, *SHAPE)
    outputs = []
    for run in (own.train(training), nn.Sequential(parts.bottom, parts.top).train(training)):
        with scoped(7):
            outputs.append(run(images))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    slopes = {
        name: each.grad
        for part in (parts.bottom, parts.top)
        for name, each in part.named_parameters()
    }
    for name, each in own.named_parameters():
        assert each.grad is not None
        assert torch.equal(slopes[name], each.grad)
    after = {**parts.bottom.state_dict(), **parts.top.state_dict()}
    assert all(torch.equal(after[name], value) for name, value in own.state_dict().items())


def test_the_layer_that_is_named_ends_the_bottom() -> None:
    last = [flat(at(Nested, f"features.{index}").bottom(0))[-1] for index in range(3)]
    assert [type(each).__name__ for each in last] == ["Conv2d", "ReLU", "Conv2d"]
    shapes = [at(Nested, f"features.{index}").smashed_shape for index in (0, 2)]
    assert shapes == [(2, 4, 4), (2, 2, 2)]
    assert at(Template, "conv2").smashed_shape == (4, 3, 3)


def test_both_parts_make_up_the_whole() -> None:
    parts = at(Nested, "features.1").parts(0)
    whole = join(parts.bottom, parts.top)
    assert list(whole.state_dict()) == list(at(Nested, "features.1").build(0).state_dict())
    images = torch.rand(2, *SHAPE)
    assert torch.equal(whole.eval()(images), nn.Sequential(parts.bottom, parts.top).eval()(images))
    with pytest.raises(IllegalCutError, match="both parts have a layer '2'"):
        join(at(Nested, "features.1").top(0), at(Nested, "features.1").top(0))


def test_a_path_and_an_index_cut_a_plain_sequence_alike() -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))
    for index in range(3):
        by_path, by_index = (cut(layers, each, image_shape=SHAPE) for each in (str(index), index))
        assert list(by_path.bottom) == list(by_index.bottom)
        assert list(by_path.top) == list(by_index.top)
    with pytest.raises(IllegalCutError, match="nothing runs after it"):
        cut(layers, "3", image_shape=SHAPE)


def test_an_activation_that_stands_at_several_places_is_cut_at_each() -> None:
    act = nn.Tanh()
    layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), act, nn.Linear(8, 8), act, nn.Flatten())
    assert [len(cut(layers, path, image_shape=SHAPE).bottom) for path in ("2", "4")] == [3, 5]


@pytest.mark.parametrize(
    ("network", "path", "why"),
    [
        (Template, "pool", r"layer 'pool' of Template runs 2 times"),
        (Template, "conv9", r"unknown layer that Template runs 'conv9'; did you mean 'conv"),
        (Template, "conv1.weight", "a Conv2d has no layers inside"),
        (Template, "fc2", "nothing runs after it"),
        (Nested, "features.9", "unknown layer that Sequential runs '9'"),
        (Recurrent, "again", "layer 'again' of Recurrent runs 3 times"),
        (Recurrent, "back", "one shared parameter on both sides"),
        (Residual, "one", r"branches around 'two'.*a module of its own"),
        (TwoInputs, "one", r"takes several inputs \(images, mask\)"),
        (Deciding, "one", "cannot be followed without numbers"),
        (Scaling, "one", "reads 'scale' by itself"),
        (Unused, "one", r"keeps 'two\.bias' outside the layers that its forward runs"),
        (Ignoring, "one", "branches around 'two'"),
        (OtherInTraining, "one", "other layers in training than in evaluation"),
        (Interleaved, "linears.0", "runs layers of 'linears' at several places"),
    ],
)
def test_what_is_no_chain_is_refused_by_name(network: type[nn.Module], path: str, why: str) -> None:
    with pytest.raises(IllegalCutError, match=why):
        cut(network(), path, image_shape=SHAPE)


def test_a_layer_that_runs_on_both_sides_of_a_cut_with_its_weights_is_refused() -> None:
    class Around(Recurrent):
        def forward(self, images: Tensor) -> Tensor:
            rows = self.again(self.first(images.flatten(1)))
            return self.again(self.last(self.back(rows)))[:, :3]

    with pytest.raises(IllegalCutError, match="one shared parameter on both sides"):
        cut(Around(), "last", image_shape=SHAPE)


def test_a_module_that_wraps_its_layers_in_hooks_is_not_taken_for_another() -> None:
    """A hook of a sequence that is cut inside would be lost, so what it does is missed."""
    with scoped(0):
        model = Nested()
    model.features.register_forward_hook(lambda layers, given, made: made * 2)
    with pytest.raises(IllegalCutError, match="something else than its stages"):
        cut(model, "features.0", image_shape=SHAPE)


def test_stages_that_are_other_in_training_alone_are_refused() -> None:
    class Dropping(nn.Module):
        stages = ("one", "two")

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Sequential(nn.Flatten(), nn.Linear(36, 8)), nn.Linear(8, 3)

        def forward(self, images: Tensor) -> Tensor:
            rows = functional.dropout(self.one(images), 0.5, training=self.training)
            out: Tensor = self.two(rows)
            return out

    with pytest.raises(IllegalCutError, match="than its stages run in order in training"):
        cut(Dropping(), 0, image_shape=SHAPE)


def test_a_chain_is_a_sequence_at_every_step() -> None:
    """Whoever runs its layers one after another computes the network."""
    model = Template().eval()
    layers = chained(model, "conv2").eval()
    values = [torch.rand(2, *SHAPE)]
    for layer in layers:
        values.append(layer(values[-1]))
    assert torch.equal(values[-1], model(values[0]))
    check_stages(model, layers, image_shape=SHAPE)
    for name in [*dict(layers.named_children())][:-1]:
        lower, upper = halves(layers, name)
        assert torch.equal(upper(lower(values[0])), values[-1])


def test_what_takes_indices_says_so_of_a_path() -> None:
    twice = replace(at(Template, "conv1"), upper_cut=4)
    with pytest.raises(IllegalCutError, match="cut = 'conv1' is a path; use an index"):
        twice.middle(0)
    linear = replace(at(Nested, "features.1"), linear_top=True)
    with pytest.raises(IllegalCutError, match=r"'features\.1' is inside of one"):
        linear.build(0)
