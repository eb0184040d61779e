"""What a stranger's client feeds its network is seen, and changes nothing."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from torch.nn import functional

from experiments.app_audit.app_run import AppError, Watched, components, run
from leakbed.flower_internals import task_identity
from leakbed.grids import LocalGrid
from tests.support import normalising_app as theirs


@pytest.fixture
def watched() -> Iterator[Watched]:
    found = Watched({"rounds": 3})
    yield found
    found.close()


def trained(app: ClientApp) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    content = {"arrays": ArrayRecord(theirs.Net().state_dict())}
    records = RecordDict({**content, "config": ConfigRecord({"server-round": 5})})
    with task_identity():
        message = Message(records, dst_node_id=2, message_type="train")
        (reply,) = LocalGrid(app, nodes=2).send_and_receive([message])
    sent = reply.content.array_records["arrays"]
    return {name: array.numpy() for name, array in sent.items()}


def test_what_a_network_is_fed_is_seen_and_changes_no_bit(watched: Watched) -> None:
    loss = functional.cross_entropy
    watched.inner = theirs.client_app()
    seen = trained(watched)
    images, labels = theirs.fed(1)
    ((kept, named),) = watched.fed[2, 5]
    assert torch.equal(kept, images)
    assert torch.equal(named, labels)
    assert watched.partitions == {2: 1}
    assert watched.batches == {(2, 5): [1]}
    assert dict(watched.models) == {"tests.support.normalising_app:Net": 1}
    assert watched.classes == {theirs.CLASSES}
    watched.close()
    assert functional.cross_entropy is not loss
    unseen = trained(theirs.client_app())
    assert all(np.array_equal(seen[name], unseen[name]) for name in unseen)
    assert len(watched.batches[2, 5]) == 1, "it still watches"


def test_what_is_no_training_is_not_kept(watched: Watched) -> None:
    net, (images, labels) = theirs.Net(), theirs.fed(0)
    functional.cross_entropy(net(images), labels)
    assert not watched.fed
    assert not watched.models


def test_a_normalisation_is_seen_as_it_is_made(watched: Watched) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    watched.watch_normalising()
    transforms.Normalize((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert watched.normalised == [([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])]


def test_a_bundle_says_what_it_runs(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.flwr.app.components]\nserverapp = "a.server:app"\nclientapp = "a.client:app"\n'
        "[tool.flwr.app.config]\nrounds = 1\nnested.rate = 0.5\n"
    )
    server, client, config = components(tmp_path)
    assert (server, client) == ("a.server:app", "a.client:app")
    assert config == {"rounds": 1, "nested.rate": 0.5}


def test_what_is_no_client_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.flwr.app.components]\nserverapp = "json:dumps"\nclientapp = "json:dumps"\n'
    )
    loss = functional.cross_entropy
    with pytest.raises(AppError, match="'json:dumps' is a function, not a ClientApp"):
        run(tmp_path, tmp_path, nodes=1)
    assert functional.cross_entropy is loss


PARTS = "/data/part-{partition}"
SERVER = """
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    replies = grid.send_and_receive([Message(RecordDict(), 1, "train")])
    raise ValueError(f"{sum(reply.has_error() for reply in replies)} nodes failed")
"""
CLIENT = """
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    raise LookupError(f"no data at {context.node_config['dataset-path']}")
"""


def test_nodes_are_configured_and_their_own_reason_comes_with_the_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "configured_app").mkdir()
    for name, code in (("__init__", ""), ("server", SERVER), ("client", CLIENT)):
        (tmp_path / "configured_app" / f"{name}.py").write_text(code)
    (tmp_path / "pyproject.toml").write_text(
        "[tool.flwr.app.components]\n"
        'serverapp = "configured_app.server:app"\nclientapp = "configured_app.client:app"\n'
    )
    reason = r"1 nodes failed .*; before that node 1 said: .*no data at /data/part-0"
    with pytest.raises(AppError, match=reason):
        run(tmp_path, tmp_path / "out", nodes=2, node_config={"dataset-path": PARTS})
