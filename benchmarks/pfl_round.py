"""pfl's side of the FedAvg benchmark; runs in pfl's environment, without this repository's.

Arranged as pfl's own benchmarks/image_classification/pytorch/train.py arranges it: users are slices
of one tensor, sampled at random, weighted by their rows; nothing is evaluated in the rounds that
count. ``benchmarks.fedavg_round`` starts it, under ``torchrun`` for several processes.
"""

import json
import os
import sys
from time import perf_counter
from types import MethodType
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import distributed
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from benchmarks.cifar_shaped import images, network
from benchmarks.paired import Turns


class EveryTurn(TrainingProcessCallback):  # type: ignore[misc]  pfl is not installed here
    """Answers for the round that ends, and holds every process until the next turn."""

    def __init__(self, turns: Turns | None) -> None:
        """Take the conversation.

        Args:
            turns: Of the first process; None in the others, which wait for it.
        """
        self._turns, self._started = turns, 0.0

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Say that training can begin."""
        del model
        self._between()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Say how long the round took.

        Args:
            aggregate_metrics: Unused.
            model: Unused.
            central_iteration: Unused.

        Returns:
            That training goes on.
        """
        del aggregate_metrics, model, central_iteration
        return self._between(), Metrics()

    def _between(self) -> bool:
        ended, more = perf_counter(), torch.ones(())
        if self._turns is not None:
            self._turns.tell(seconds=ended - self._started)
            more *= self._turns.wait()
        distributed.all_reduce([more])  # one process alone is told to end, all must
        self._started = perf_counter()
        return bool(more < distributed.world_size)


def model() -> PyTorchModel:
    """Return the network as pfl trains it."""
    net = network()

    def loss(self: nn.Module, inputs: Tensor, labels: Tensor, *, eval: bool = False) -> Tensor:  # noqa: A002  pfl's keyword
        self.train(not eval)
        return nn.functional.cross_entropy(self(inputs), labels)

    def metrics(self: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Any]:
        return {"loss": Weighted(self.loss(inputs, labels, eval=True).item(), 1)}

    net.loss, net.metrics = MethodType(loss, net), MethodType(metrics, net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    return PyTorchModel(net, local_optimizer_create=torch.optim.SGD, central_optimizer=optimizer)


def users(nodes: int) -> FederatedDataset:
    """Return the rows dealt out evenly, as views."""
    parts = [tensor.chunk(nodes) for tensor in images()]
    data = dict(enumerate(zip(*parts, strict=True)))
    return FederatedDataset.from_slices(data, get_user_sampler("random", list(data)))


def main(threads: str, settings: str) -> None:
    """Train one round at each turn.

    Args:
        threads: ``"all-cores"`` or ``"one-thread"``, of each process.
        settings: ``benchmarks.fedavg_round.Size`` as JSON.
    """
    size = json.loads(settings)
    torch.set_num_threads(os.cpu_count() or 1 if threads == "all-cores" else 1)
    torch.manual_seed(0)
    train = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=0.01, local_batch_size=size["batch"]
    )
    rounds = NNAlgorithmParams(
        central_num_iterations=size["turns"],
        evaluation_frequency=size["turns"] + 1,  # the first round alone, which warms up
        train_cohort_size=size["sampled"],
        val_cohort_size=0,
    )
    data = users(size["nodes"])
    FederatedAveraging().run(
        algorithm_params=rounds,
        backend=SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model=model(),
        model_train_params=train,
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[EveryTurn(Turns() if distributed.global_rank == 0 else None)],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
