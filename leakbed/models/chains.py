"""Anybody's network as a sequence of its own layers, so that it can be cut where a path says.

A forward is run once without numbers (torch.fx), every layer that it calls taken as a whole, in
training and in evaluation. Where one value alone crosses from each layer to the next, the layers,
and the code between them, make an ``nn.Sequential`` in which every weight keeps its name. Where a
forward branches, takes several inputs or reads weights by itself, the error says so.
"""

from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from itertools import groupby, takewhile
from typing import NamedTuple

from torch import Tensor, fx, nn

from leakbed.lookup import format_error, unknown_name


class IllegalCutError(ValueError):
    """A cut where the network cannot be parted; the message names the legal ones."""


class Between(nn.Module):
    """What a forward does in code between two of its layers; has no weights."""

    def __init__(self, *, training: fx.GraphModule, evaluating: fx.GraphModule) -> None:
        """Keep both, as code may ask for the mode that its network is in."""
        super().__init__()
        self.in_training = training
        self.in_evaluation = evaluating

    def forward(self, given: Tensor) -> Tensor:
        """Return what the code makes of a layer's output."""
        made: Tensor = (self.in_training if self.training else self.in_evaluation)(given)
        return made


class Again(nn.Module):
    """Runs a layer once more whose weights stand where it runs first."""

    def __init__(self, layer: nn.Module) -> None:
        """Refer to the layer.

        Args:
            layer: Of the same part; its weights are listed there alone.
        """
        super().__init__()
        self._layer = (layer,)  # in a tuple it is no submodule, so no weight has two names

    @property
    def layer(self) -> nn.Module:
        """The layer that is run."""
        return self._layer[0]

    def forward(self, given: Tensor) -> Tensor:
        """Return what the layer makes."""
        made: Tensor = self.layer(given)
        return made


class _Step(NamedTuple):
    """One step of a forward: a layer, by its path in the network, or code between layers."""

    path: str
    module: nn.Module


def chained(model: nn.Module, path: str) -> nn.Sequential:
    """Return a network as a sequence that shares its layers, down to the one that a path names.

    A layer that contains the named one becomes a sequence itself; all others stay as they are. A
    layer without weights that runs twice stands at both places.

    Args:
        model: Any; left as it is.
        path: Of a layer, as ``state_dict`` has it, such as ``"features.3"``.

    Returns:
        The layers in the order they run, under their own names, and the code between them.

    Raises:
        IllegalCutError: It runs no such layer, runs it several times, or is no chain of layers.
    """
    steps = _steps(model)
    found = [step for step in steps if path == step.path or path.startswith(f"{step.path}.")]
    inside = any(step.path.startswith(f"{path}.") for step in steps)  # a list of layers
    if not found and not inside:
        runs = dict.fromkeys(step.path for step in steps if not isinstance(step.module, Between))
        raise IllegalCutError(unknown_name(f"layer that {type(model).__name__} runs", path, runs))
    if len(found) > 1:
        raise IllegalCutError(
            f"layer {found[0].path!r} of {type(model).__name__} runs {len(found)} times, so a cut "
            "after it has no one place; name a layer before or after it"
        )
    if found and path != found[0].path:
        held = found[0]
        parted = chained(held.module, path[len(held.path) + 1 :])
        steps = [_Step(held.path, parted) if step is held else step for step in steps]
    layers = _nested(_listed_once(steps), type(model).__name__)
    if left_out := sorted(set(model.state_dict()) - set(layers.state_dict())):
        raise IllegalCutError(
            f"{type(model).__name__} keeps {left_out[0]!r} outside the layers that its forward "
            "runs, or under a second name, so no cut can say which part it belongs to"
        )
    return layers


def is_plain(model: nn.Module) -> bool:
    """Say whether a module runs its submodules one after another, and does nothing else."""
    return isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward


def flat(layers: nn.Sequential) -> list[nn.Module]:
    """Return layers in the order they run; in place of a plain ``nn.Sequential`` its own layers."""
    found: list[nn.Module] = []
    for layer in layers:
        found += flat(layer) if type(layer) is nn.Sequential else [layer]
    return found


def _steps(model: nn.Module) -> list[_Step]:
    """Return what a forward runs, in order."""
    if is_plain(model):
        named = model.named_modules(remove_duplicate=False)
        return [_Step(name, each) for name, each in named if name and "." not in name]
    name = type(model).__name__
    if not list(model.children()):
        raise IllegalCutError(f"a {name} has no layers inside that a path could name")
    training, evaluating = (_pieces(_traced(model, training=mode), name) for mode in (True, False))
    if [piece.layer for piece in training] != [piece.layer for piece in evaluating]:
        raise IllegalCutError(
            f"{name} runs other layers in training than in evaluation, so no cut is the same in "
            "both; give it an attribute `stages`, or make it an nn.Sequential"
        )
    return [
        _Step(f"code-{index}", Between(training=one.code(), evaluating=other.code()))
        if one.layer is None
        else _Step(one.layer, model.get_submodule(one.layer))
        for index, (one, other) in enumerate(zip(training, evaluating, strict=True))
    ]


class _Outline(fx.Tracer):
    """Takes every layer that a forward calls as a whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return True: no layer is looked into."""
        del m, module_qualified_name
        return True


def _traced(model: nn.Module, *, training: bool) -> fx.Graph:
    """Return what a forward does in one mode, or say why that cannot be told without numbers."""
    name = type(model).__name__
    try:
        graph = _Outline().trace(deepcopy(model).train(training))
    except Exception as error:
        raise IllegalCutError(
            f"the forward of {name} cannot be followed without numbers, as one that decides by "
            f"its values cannot: {' '.join(format_error(error).split())}; give it an attribute "
            "`stages`, or make it an nn.Sequential"
        ) from error
    inputs = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise IllegalCutError(
            f"the forward of {name} takes several inputs ({', '.join(inputs)}), so what its first "
            "layers make of one is not all that the others read; wrap it in a module of one input"
        )
    for node in graph.nodes:
        if node.op == "get_attr":
            raise IllegalCutError(
                f"the forward of {name} reads {node.target!r} by itself, outside of its layers, so "
                "no cut can say which part it belongs to; move it into a layer"
            )
    return graph


class _Piece(NamedTuple):
    """Nodes of a forward before and after which one value alone is still to be used."""

    nodes: list[fx.Node]
    given: fx.Node
    made: fx.Node

    @property
    def layer(self) -> str | None:
        """The path of the layer that it is; None of code."""
        return next((str(node.target) for node in self.nodes if node.op == "call_module"), None)

    @property
    def is_layer(self) -> bool:
        """Whether it is one layer, which is given one value and whose output alone goes on."""
        node = self.nodes[0]
        of_one = node.args == (self.given,) and not node.kwargs
        return len(self.nodes) == 1 and node.op == "call_module" and of_one and self.made is node

    def code(self) -> fx.GraphModule:
        """Return it as a module of one input and one output."""
        graph = fx.Graph()
        known = {self.given: graph.placeholder("given")}
        for node in self.nodes:
            known[node] = graph.node_copy(node, known.__getitem__)
        graph.output(known[self.made])
        return fx.GraphModule(nn.Module(), graph)


def _pieces(graph: fx.Graph, name: str) -> list[_Piece]:
    """Return the layers of a forward, and the code between them, in order."""
    given, *nodes, end = graph.nodes
    at = {node: index for index, node in enumerate(graph.nodes)}
    last = {node: max(map(at.__getitem__, node.users), default=-1) for node in at}
    if not isinstance(end.args[0], fx.Node):
        raise IllegalCutError(f"the forward of {name} returns several things; return one tensor")
    pieces: list[_Piece] = []
    begun: list[fx.Node] = []
    entered = given
    for node in nodes:
        begun.append(node)
        crossing = [each for each in at if at[each] <= at[node] < last[each]]
        if len(crossing) == 1:
            pieces.append(_Piece(begun, entered, crossing[0]))
            begun, entered = [], crossing[0]
    for piece in pieces:
        called = [node for node in piece.nodes if node.op == "call_module"]
        if called and not piece.is_layer:
            among = ", ".join(dict.fromkeys(repr(str(each.target)) for each in called))
            raise IllegalCutError(
                f"the forward of {name} branches around {among}: more than one value crosses "
                "there, so it is no chain of layers; put the branch into a module of its own, or "
                "give the network an attribute `stages`"
            )
    return pieces


def _listed_once(steps: Sequence[_Step]) -> list[_Step]:
    """Return steps under names of their own: what runs again, and code beside its neighbours."""
    listed: list[_Step] = []
    seen: set[str] = set()
    for index, (path, module) in enumerate(steps):
        named = path
        if isinstance(module, Between):
            around = [step.path.split(".")[:-1] for step in steps[max(0, index - 1) : index + 2]]
            around = [around[0], around[-1]] if 0 < index < len(steps) - 1 else [[], []]
            both = takewhile(lambda pair: pair[0] == pair[1], zip(*around, strict=False))
            named = ".".join([*(one for one, _ in both), path])
        elif path in seen:
            named = f"{path}-again-{index}"
            module = Again(module) if module.state_dict() else module  # noqa: PLW2901
        seen.add(path)
        listed.append(_Step(named, module))
    return listed


def _nested(steps: Sequence[_Step], name: str) -> nn.Sequential:
    """Return steps as a sequence, those with a container in their paths as sequences inside."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for first, group in groupby(steps, key=lambda step: step.path.partition(".")[0]):
        inside = list(group)
        if first in layers:
            raise IllegalCutError(
                f"{name} runs layers of {first!r} at several places, with layers of "
                f"{next(reversed(layers))!r} between them; give each place a container of its own"
            )
        if inside[0].path == first:
            layers[first] = inside[0].module
        else:
            rest = [_Step(step.path.partition(".")[2], step.module) for step in inside]
            layers[first] = _nested(rest, name)
    return nn.Sequential(layers)
