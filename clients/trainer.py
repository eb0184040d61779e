"""A part of the network in training at a node: weights, optimiser and its place in the data.

A trainer lives in memory or in ``context.state``, as the node's runtime allows; see each part's
file for what else it keeps between messages.

:func:`blank` builds the part that weights are then loaded into.
"""

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
from flwr.app import Context
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from clients.malicious import MaliciousClientSession
from clients.node import NodeConfig, UnfitBottomError
from leakbed.events import Arrays
from leakbed.grids.base import UNFIT_BOTTOM
from leakbed.models import DETERMINISTIC, Architecture
from leakbed.seeds import derive, scoped
from leakbed.tensors import as_tensor, finite, load, placed
from leakbed.wire.records import WireError, as_arrays, pack, refuse_unlike, unpack

Part = Literal["whole", "bottom", "head"]


def blank(architecture: Architecture, part: Part, device: torch.device) -> nn.Module:
    """Return a part whose weights are of no meaning, at a fraction of the price of building it.

    Args:
        architecture: The network; cut, where the part is not the whole.
        part: Which one.
        device: Where it computes.

    Returns:
        The caller's own.
    """
    return copy.deepcopy(_template(architecture, part, device))


@lru_cache(maxsize=16)
def _template(architecture: Architecture, part: Part, device: torch.device) -> nn.Module:
    make = {"whole": architecture.build, "bottom": architecture.bottom, "head": architecture.head}
    return make[part](0).to(device)


def draws(module: nn.Module) -> bool:
    """Return whether a forward pass may draw from the global generators, as dropout does.

    Args:
        module: Any; layers that are not known to draw nothing, or have hooks, are taken to draw.

    Returns:
        False where every layer is of a type known to be deterministic.
    """
    return not all(
        type(layer) in DETERMINISTIC and not layer._forward_hooks and not layer._forward_pre_hooks  # noqa: SLF001
        for layer in module.modules()
    )


class PartTrainer:
    """What the bottom's and the head's trainer share; rebuilt or kept, never shared.

    Attributes:
        module: The part; its weights must be loaded before it is used.
        optimiser: Over its parameters.
    """

    def __init__(
        self, cell: NodeConfig, part: Part, *, intrusion: MaliciousClientSession | None = None
    ) -> None:
        """Make the trainer.

        Args:
            cell: The node's.
            part: Which part it trains.
            intrusion: The intruder at this node, which it shares with the other part's trainer.
        """
        self._cell = cell
        self._intrusion = intrusion
        self._keys = f"leakbed.{part}", f"leakbed.{part}-optimiser"
        self._device = cell.torch_device()
        self.module = blank(cell.architecture, part, self._device).train()
        self._draws = draws(self.module)
        self._images, self._labels = cell.training_rows()
        self.optimiser = cell.plan.optimiser(self.module.parameters())
        self._fresh = self.optimiser.state_dict()
        self._batches: dict[int, list[Tensor]] = {}
        self._steps = (0, 0)

    def batch(self, round_: int, step: int) -> Int[Tensor, " batch"]:
        """Return the node's rows of one step."""
        return self._planned(round_)[step]

    def steps(self, round_: int) -> tuple[int, int]:
        """Return how many steps and samples a round has at this node."""
        self._planned(round_)
        return self._steps

    def images(self, round_: int, step: int) -> Float[Tensor, " batch *image"]:
        """Return what the part is shown at a step: the node's rows, or what an intruder made."""
        rows = self.batch(round_, step)
        made = None if self._intrusion is None else self._intrusion.images(len(rows))
        shown = self._images.index_select(0, rows) if made is None else made
        return placed(shown, self._device)

    def labels_of(self, round_: int, step: int) -> Int[Tensor, " batch"]:
        """Return the labels of what the part is shown at a step."""
        rows = self.batch(round_, step)
        made = None if self._intrusion is None else self._intrusion.labels(len(rows))
        return self._labels.index_select(0, rows) if made is None else made

    @property
    def frozen(self) -> bool:
        """Whether the part must stay as it is while an intruder learns from its batch."""
        return self._intrusion is not None and self._intrusion.freezes

    def output(
        self, received: Float[Tensor, " batch *input"], *, role: str
    ) -> Float[Tensor, " batch *output"]:
        """Return what the part makes of a batch.

        Args:
            received: On the trainer's device.
            role: Names the random stream of this forward pass, a part of the node's own.

        Returns:
            With its graph.
        """
        run = self._unchanged if self.frozen else self.module
        if self._draws:
            with scoped(derive(self._cell.stream, role)):
                made: Tensor = run(received)
        else:
            made = run(received)
        return made

    def load(self, arrays: Arrays) -> None:
        """Take weights and buffers from the wire or from the node's state.

        Args:
            arrays: All of them, or some: those it lacks stay. Names of other parts are ignored.
        """
        own = {name: arrays[name] for name in self.module.state_dict() if name in arrays}
        load(self.module, own, strict=False)

    def arrays(self) -> Arrays:
        """Return copies of the weights and buffers."""
        return {k: v.detach().cpu().numpy().copy() for k, v in self.module.state_dict().items()}

    def forget(self) -> None:
        """Drop momenta and step counts, as at the start."""
        self.optimiser.load_state_dict(self._fresh)

    def store(self, context: Context) -> None:
        """Write weights, buffers and the optimiser into the node's state."""
        weights, optimiser = self._keys
        context.state[weights] = pack(self.arrays())
        context.state[optimiser] = pack(momenta_of(self.optimiser))

    def restore(self, context: Context) -> bool:
        """Take from the node's state what :meth:`store` wrote; say whether there was anything."""
        stored = context.state.array_records
        weights, optimiser = self._keys
        if weights not in stored:
            return False
        load_momenta(self.optimiser, unpack(stored[optimiser]))
        self.load(as_arrays(stored[weights]))
        return True

    def _unchanged(self, received: Tensor) -> Tensor:
        """Return what the part makes of a batch that its buffers do not count."""
        buffers = {name: value.clone() for name, value in self.module.named_buffers()}
        made: Tensor = functional_call(self.module, buffers, (received,))
        return made

    def _planned(self, round_: int) -> list[Int[Tensor, " batch"]]:
        if round_ not in self._batches:
            batches = self._cell.batches(round_, len(self._images))
            self._batches = {round_: batches}
            self._steps = len(batches), sum(map(len, batches))
        return self._batches[round_]


def gradients_of(module: nn.Module, *, share: float = 1.0) -> dict[str, Tensor]:
    """Return copies of the gradients of what is trained of a module, by name.

    Args:
        module: After backpropagation; a weight that it did not reach has a gradient of zero.
        share: What they are divided by.

    Returns:
        On the module's device.
    """
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad / share
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def momenta_of(optimiser: torch.optim.Optimizer) -> Arrays:
    """Return copies of an optimiser's momenta and step counts, by ``parameter/name``."""
    state: Mapping[int, Mapping[str, Any]] = optimiser.state_dict()["state"]
    return {
        f"{index}/{name}": value.detach().cpu().numpy().copy()
        for index, values in state.items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def load_momenta(optimiser: torch.optim.Optimizer, arrays: Arrays) -> None:
    """Let an optimiser go on from what :func:`momenta_of` returned.

    Args:
        optimiser: Over parameters in the same order.
        arrays: By ``parameter/name``; the optimiser writes to them.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in arrays.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = torch.from_numpy(value)
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def arrays_of(module: nn.Module) -> Arrays:
    """Return a part's weights and buffers by name, over its own memory where that is the CPU's."""
    return {name: value.detach().cpu().numpy() for name, value in module.state_dict().items()}


def refuse_unfit(cell: NodeConfig, arrays: Arrays, like: Arrays, *, whole: bool = True) -> None:
    """Refuse weights to go on from that are not sound, before any of them is loaded.

    Whoever relays a sealed bottom cannot look into it, so the node that receives it must.

    Args:
        cell: The node's.
        arrays: As received.
        like: All of the node's part: names, shapes and types.
        whole: Whether none may be missing, as when a round begins.

    Raises:
        UnfitBottomError: Names the first array that is missing, unknown, of another shape or type,
            or not finite.
    """
    wanted = like if whole else {name: like[name] for name in arrays if name in like}
    try:
        refuse_unlike(arrays, wanted, what="bottom")
    except WireError as error:
        raise UnfitBottomError(f"node {cell.partition}: {UNFIT_BOTTOM}: {error}") from error
    for name, array in arrays.items():
        if not finite(as_tensor(array)):
            raise UnfitBottomError(
                f"node {cell.partition}: {UNFIT_BOTTOM}: its array {name!r} is not finite"
            )
