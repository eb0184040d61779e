"""Nodes that misbehave on request; a module of its own, so that Ray's workers can import it."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from leakbed.wire.calls import serve
from leakbed.wire.messages import SPLIT_STEP, SplitReply, SplitRequest
from tests.support.waiting import until

app = ClientApp()
release = threading.Event()  # lets a node that hangs in this process go, so that a test can end


def message(node: int, kind: str, records: RecordDict | None = None) -> Message:
    return Message(records or RecordDict(), dst_node_id=node, message_type=f"query.{kind}")


def said(reply: Message) -> dict[str, Any]:
    """What a node answered."""
    return dict(reply.content.config_records["said"])


def _answer(message: Message, **values: Any) -> Message:
    return Message(RecordDict({"said": ConfigRecord(values)}), reply_to=message)


@app.query("roster")
def roster(message: Message, context: Context) -> Message:
    partition = ConfigRecord({"partition": int(context.node_config["partition-id"])})
    return Message(RecordDict({"roster": partition}), reply_to=message)


@app.query("count")
def count(message: Message, context: Context) -> Message:
    live: dict[str, int] = context.live  # type: ignore[attr-defined]
    live["calls"] = live.get("calls", 0) + 1
    return _answer(message, calls=live["calls"], process=os.getpid(), node=context.node_id)


@app.query("thread")
def thread(message: Message, context: Context) -> Message:
    return _answer(message, thread=threading.current_thread().name, node=context.node_id)


@app.query("remember")
def remember(message: Message, context: Context) -> Message:
    """Count in the state, as a node between two rounds does, and keep nothing alive."""
    context.live.clear()  # type: ignore[attr-defined]
    record = context.state.config_records.get("calls", ConfigRecord({"calls": 0}))
    calls = int(record["calls"]) + 1  # type: ignore[arg-type]
    context.state["calls"] = ConfigRecord({"calls": calls})
    return _answer(message, calls=calls, process=os.getpid(), node=context.node_id)


@app.query("nap")
def nap(message: Message, context: Context) -> Message:
    time.sleep(1)
    return remember(message, context)


@app.query("attend")
def attend(message: Message, context: Context) -> Message:
    """Leave this node's process id, and answer once there is a file "go"."""
    folder = Path(str(message.content.config_records["config"]["folder"]))
    left = folder / f"new-{context.node_id}"
    left.write_text(str(os.getpid()))
    left.rename(folder / f"node-{context.node_id}")
    until((folder / "go").exists)
    return remember(message, context)


@app.query("linger")
def linger(message: Message, context: Context) -> Message:
    """Hang until killed at the first try, having left a process id; answer at the next."""
    left = Path(str(message.content.config_records["config"]["file"]))
    if not left.exists():
        left.with_suffix(".new").write_text(str(os.getpid()))
        left.with_suffix(".new").rename(left)
        release.wait()
    return remember(message, context)


@app.query("place")
def place(message: Message, context: Context) -> Message:
    import torch  # noqa: PLC0415  workers start twice as fast without

    return _answer(
        message,
        folder=str(Path.cwd()),
        data=os.environ.get("LEAKBED_DATA", ""),
        cuda=os.environ.get("CUDA_VISIBLE_DEVICES", "unset"),
        gpus=torch.cuda.device_count(),
        threads=torch.get_num_threads(),
        leakbed=str(sys.modules["leakbed"].__file__),
        app=__file__,
    )


@app.query("change")
def change(message: Message, context: Context) -> Message:
    """Change in place what came, and tell what it was before."""
    records = message.content
    before = int(records.config_records["config"]["value"])  # type: ignore[arg-type]
    size = len(records.array_records["arrays"])
    records.config_records["config"]["value"] = before + 1
    records.array_records["arrays"].clear()
    return _answer(message, before=before, size=size)


@app.query("raise")
def fail(message: Message, context: Context) -> Message:
    raise ZeroDivisionError("no reason at all")


@app.query("unsendable")
def unsendable(message: Message, context: Context) -> Message:
    reply = _answer(message)
    reply.content.config_records["said"].__dict__["_data"]["lock"] = threading.Lock()
    return reply


@app.query("hang")
def hang(message: Message, context: Context) -> Message:
    release.wait()
    return _answer(message)


@app.query("die")
def die(message: Message, context: Context) -> Message:
    os._exit(3)


STOPPING = 9  # the step at which a node's process stops


@serve(app, SPLIT_STEP, SplitRequest)
def step(request: SplitRequest, context: Context) -> SplitReply:
    """Send the gradient back, with this process's number for that of steps."""
    if request.step == STOPPING:
        os.kill(os.getpid(), signal.SIGSTOP)
    return SplitReply(steps=os.getpid(), examples=2, step=request.step, smashed=request.gradient)
