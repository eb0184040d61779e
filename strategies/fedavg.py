"""FedAvg: Flower's own strategy, unchanged. Leakbed adds nothing on the server but the wiretap.

Source: McMahan, Moore, Ramage, Hampson, Aguera y Arcas. "Communication-Efficient Learning of Deep
Networks from Decentralized Data", AISTATS 2017, https://arxiv.org/abs/1602.05629.
"""

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg

from strategies.setup import Built, Setup


def build(setup: Setup) -> Built:
    """Return Flower's FedAvg with the first weights of the whole network.

    Args:
        setup: Its architecture, first stream, nodes and sampled fraction are used.

    Returns:
        The strategy; utility is measured on its arrays by the harness.
    """
    few = min(2, setup.nodes)  # Flower's own default minimum, where there are so many
    strategy = FedAvg(
        fraction_train=setup.fraction,
        fraction_evaluate=0.0,
        min_train_nodes=few if setup.fraction < 1 else setup.nodes,
        min_available_nodes=setup.nodes,
    )
    model = setup.architecture.build(setup.init_stream)
    return Built(strategy=strategy, arrays=ArrayRecord(dict(model.state_dict())))
