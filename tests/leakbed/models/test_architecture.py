import json
import pickle
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from leakbed.models import (
    Architecture,
    IllegalCutError,
    ModelMismatchError,
    UnknownModelError,
    redrawn,
)
from leakbed.models.cutting import guarded
from leakbed.seeds import scoped
from tests.support.strange_networks import Lowers


@pytest.fixture(autouse=True)
def own_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "support"))
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)


def own(name: str, **settings: object) -> Architecture:
    settings = {"image_shape": (1, 4, 4), "num_classes": 10} | settings
    return Architecture(name=f"own_networks:{name}", **settings)


def mnistnet(**settings: object) -> Architecture:
    return Architecture(name="mnistnet", image_shape=(1, 28, 28), num_classes=10, **settings)


def test_is_a_plain_value() -> None:
    architecture = mnistnet(cut=2, activation="silu")
    assert pickle.loads(pickle.dumps(architecture)) == architecture  # noqa: S301
    assert hash(architecture) == hash(mnistnet(cut=2, activation="silu"))
    assert json.loads(json.dumps(asdict(architecture)))["image_shape"] == [1, 28, 28]


def test_weights_are_a_pure_function_of_the_stream() -> None:
    torch.manual_seed(1)
    first = mnistnet().build(5).state_dict()
    torch.manual_seed(2)
    second = mnistnet().build(5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = mnistnet().build(6).state_dict()
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_building_leaves_global_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    mnistnet(cut=1).bottom(5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_parts_hold_the_weights_of_the_whole() -> None:
    architecture = mnistnet(cut=4)
    whole = architecture.build(5).state_dict()
    parts = {**architecture.bottom(5).state_dict(), **architecture.top(5).state_dict()}
    assert list(parts) == list(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert architecture.smashed_shape == (16, 8, 8)


def test_uniform_initialisation_covers_weights_and_biases() -> None:
    for name, parameter in mnistnet(initialisation="uniform").build(5).named_parameters():
        assert parameter.abs().max() <= 0.5, name
        assert parameter.abs().max() > 0.3, name
    assert mnistnet().build(5)[6].weight.abs().max() < 0.1


def test_layer_names_say_what_each_index_is() -> None:
    assert mnistnet().layer_names[4:7] == ("ReLU", "MaxPool2d", "FlattenLinear")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "mnist-net"}, "did you mean 'mnistnet'"),
        ({"activation": "sillu"}, "unknown activation 'sillu'; did you mean 'silu'"),
        ({"initialisation": "unifrom"}, "did you mean 'uniform'"),
        ({"name": "own_networks:Sequense"}, "did you mean 'Sequence'"),
        ({"name": "no_such_package:Net"}, "cannot import 'no_such_package'"),
        ({"name": "own_networks:"}, "write 'package.module:name'"),
        ({"name": "own_networks:NOT_CALLABLE"}, "is a int, which cannot be called"),
    ],
)
def test_unknown_names_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UnknownModelError, match=message):
        Architecture(
            **{"name": "mnistnet", "image_shape": (1, 28, 28), "num_classes": 10} | settings
        ).build(0)


def test_empty_images_and_no_classes_are_refused() -> None:
    with pytest.raises(ModelMismatchError, match="all four numbers must be positive"):
        Architecture(name="mlp2", image_shape=(0, 28, 28), num_classes=10)
    with pytest.raises(ModelMismatchError, match="0 classes"):
        Architecture(name="mlp2", image_shape=(1, 28, 28), num_classes=0)


def test_an_image_too_small_names_the_model_and_the_size() -> None:
    with pytest.raises(ModelMismatchError, match=r"'mnistnet'.*15x28.*at least 16x16"):
        Architecture(name="mnistnet", image_shape=(1, 15, 28), num_classes=10).build(0)


def test_without_a_cut_there_are_no_parts() -> None:
    with pytest.raises(IllegalCutError, match=r"has no cut; set `cut` .* 0 to 9"):
        mnistnet().bottom(0)


def test_own_sequence_gets_the_keywords_it_has() -> None:
    architecture = own("Sequence", num_classes=3, cut=1)
    assert architecture.smashed_shape == (2, 2, 2)
    assert int(architecture.build(0)[1].num_batches_tracked) == 0, "checking it counted a batch"
    assert torch.equal(architecture.bottom(4)[0].weight, architecture.build(4)[0].weight)


def test_own_staged_module_runs_in_stage_order() -> None:
    architecture = own("Staged", activation="silu", cut=2)
    assert architecture.smashed_shape == (5,)
    names = [name for name, _ in architecture.build(0).named_children()]
    assert names == ["flatten", "hidden", "act", "output"]
    assert isinstance(architecture.build(0)[2], nn.SiLU)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Staged", {"num_classes": 9}, r"returns rows of shape \(10,\).*9 classes"),
        ("Staged", {"image_shape": (1, 5, 5)}, r"cannot read images of shape \(1, 5, 5\)"),
        ("Sequence", {"activation": "silu"}, "takes no keyword `activation`"),
        ("Demanding", {}, "missing a required argument: 'depth'"),
        ("Secretive", {}, "something else than its stages"),
        ("Hoarder", {}, "'extra.bias' outside its stages"),
        ("Mistaken", {}, "names 'hiden'.*output, hidden, act, flatten"),
        ("Stageless", {}, "its forward raised NotImplementedError"),
        ("Lazy", {}, "has lazy layers"),
        ("Builtin", {}, "no signature found"),
        ("broken", {}, r"raised RuntimeError: out of ideas \(own_networks.py, line"),
        ("no_module", {}, "gave a str, not a torch"),
    ],
)
def test_own_networks_that_do_not_fit(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises((ModelMismatchError, UnknownModelError), match=message):
        own(name, **settings).build(0)


def test_three_parts_hold_the_weights_of_the_whole() -> None:
    architecture = mnistnet(cut=2, upper_cut=7)
    whole = architecture.build(5).state_dict()
    parts = [architecture.bottom(5), architecture.middle(5), architecture.head(5)]
    held = {name: value for part in parts for name, value in part.state_dict().items()}
    assert list(held) == list(whole)
    assert all(torch.equal(held[name], whole[name]) for name in whole)
    assert [len(part) for part in parts] == [3, 5, 3]
    assert (architecture.smashed_shape, architecture.features_shape) == ((8, 12, 12), (120,))


def test_three_parts_run_one_after_another_are_the_network() -> None:
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    expected = mnistnet().build(5)(images)
    for cut, upper_cut in ((0, 1), (2, 8), (5, 9), (8, 9)):
        architecture = mnistnet(cut=cut, upper_cut=upper_cut)
        smashed = architecture.bottom(5)(images)
        features = architecture.middle(5)(smashed)
        assert features.shape[1:] == architecture.features_shape
        assert torch.equal(architecture.head(5)(features), expected)


@pytest.mark.parametrize(
    ("cut", "upper_cut"), [(2, None), (None, 8), (None, None), (8, 8), (8, 2), (2, 10), (2, 11)]
)
def test_an_upper_cut_lies_above_the_cut_and_below_the_last_layer(
    cut: int | None, upper_cut: int | None
) -> None:
    architecture = mnistnet(cut=cut, upper_cut=upper_cut)
    expected = f"cut < upper_cut < 10; got cut = {cut} and upper_cut = {upper_cut}"
    for refused in (architecture.middle, architecture.head):
        with pytest.raises(IllegalCutError, match=expected):
            refused(0)
    with pytest.raises(IllegalCutError, match=expected):
        _ = architecture.features_shape


def strange(name: str, **settings: object) -> Architecture:
    settings = {"image_shape": (1, 6, 6), "num_classes": 3} | settings
    return Architecture(name=f"tests.support.strange_networks:{name}", **settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bfloat16", r"'2\.weight' is bfloat16.*float32 or float64.*\.float\(\)"),
        ("half", r"'2\.weight' is float16; .*trained and attacked in float32 or float64"),
        ("bare_half", r"'1\.weight' is float16"),
        ("complex_", r"'1\.phase' is complex64"),
        ("bare_double", r"cannot read images of shape \(1, 6, 6\).*images come as float32"),
        ("TwoInputs", r"TwoInputs'.* cannot read images of shape \(1, 6, 6\): .*TypeError.*age"),
        ("Raises", r"cannot read images of shape .*KeyError: 'mask'"),
        ("Pair", r"returns a tuple, not one tensor"),
        ("dictionary", r"returns a dict, not one tensor"),
    ],
)
def test_what_no_run_could_read_is_one_line(name: str, message: str) -> None:
    with pytest.raises(ModelMismatchError, match=message) as caught:
        strange(name).build(0)
    assert "\n" not in str(caught.value)
    assert f"model 'tests.support.strange_networks:{name}'" in str(caught.value)


def test_double_precision_behind_a_cast_is_a_network_like_others() -> None:
    assert strange("double").build(0)[2].weight.dtype == torch.float64


@pytest.mark.parametrize("kind", ["rectified", "written"])
def test_layers_that_work_in_place_leave_what_they_are_given(kind: str) -> None:
    """So no tap, attack or evaluation finds its own tensor changed, or may not have a gradient."""
    given = torch.randn(2, 4, 4, 4)
    held = given.clone().requires_grad_()
    top, apart = (strange(f"{kind}_{place}", cut=0).top(0) for place in ("in_place", "apart"))
    assert torch.equal(top(given), apart(held))
    assert torch.equal(given, held)
    (pulled,) = torch.autograd.grad(top(held).sum(), held)
    assert torch.equal(pulled, torch.autograd.grad(apart(held).sum(), held)[0])
    cuts = strange(f"{kind}_in_place", cut=0, upper_cut=2)
    for part, shape in ((cuts.middle(0), given.shape), (cuts.head(0), (2, 3, 2, 2))):
        part(torch.zeros(shape, requires_grad=True))


def test_a_network_that_writes_to_images_computes_on_copies_of_them() -> None:
    images = torch.rand(2, 1, 6, 6)
    held = images.clone()
    for network in (strange("overwriting").build(0), strange("overwriting", cut=0).bottom(0)):
        network(images)
        assert torch.equal(images, held)


@pytest.mark.parametrize("first", [nn.Flatten(), nn.Sequential(nn.Identity(), nn.Flatten())])
def test_what_is_given_is_not_written_to_through_a_view_of_it(first: nn.Module) -> None:
    given = torch.randn(2, 3, 4)
    held = given.clone()
    guarded(nn.Sequential(first, Lowers(inplace=True)))(given)
    assert torch.equal(given, held)


def test_a_block_that_adds_what_it_wrote_over_stays_as_written() -> None:
    layers = strange("adding").build(0)
    given = torch.randn(2, 1, 6, 6)
    assert torch.equal(layers[1](given.clone()), layers[1].inner[1](given.relu()) + given.relu())


class Scaled(nn.Module):
    """Draws its own weight as layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.empty(4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.scale)


def layers() -> nn.Sequential:
    first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Scaled())
    return nn.Sequential(first, nn.MultiheadAttention(4, 2), nn.PReLU())


def test_a_network_that_is_handed_over_draws_weights_as_its_constructor_does() -> None:
    network = layers()
    network[0][1](torch.ones(3, 4) * 5)  # running statistics are private as well
    network[0][0].weight.grad = torch.ones(4, 4)
    build = redrawn(network)
    with torch.no_grad():
        network[0][0].weight.zero_()  # a later change of the caller's
    with scoped(3):
        built = build()
    with scoped(3):
        made = layers().state_dict()
    assert all(torch.equal(each, made[name]) for name, each in built.state_dict().items())
    assert not torch.equal(build()[0][0].weight, made["0.0.weight"])  # of another stream
    assert built.training
    assert all(each.grad is None for each in built.parameters())


def test_a_layer_that_cannot_draw_its_weights_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    with pytest.raises(ModelMismatchError, match=r"layer '1' \(Bare\) has weights of its own and"):
        redrawn(nn.Sequential(nn.Linear(1, 1), Bare()))
    with pytest.raises(ModelMismatchError, match=r"model Bare: it \(Bare\) has weights"):
        redrawn(Bare())
