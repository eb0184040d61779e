"""Nodes on GPUs that Ray was told of but that are not there; Ray's workers import it."""

import os

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from leakbed.tensors import resolve_device

app = ClientApp()
caps: list[float] = []


def _visible() -> list[str]:
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",") if name]


def pretend() -> None:
    """Let torch see the GPUs this process may see, and only write down what it is asked to cap."""
    torch.cuda.is_available = lambda: bool(_visible())
    torch.cuda.device_count = lambda: len(_visible())
    torch.cuda.set_per_process_memory_fraction = lambda fraction, device=None: caps.append(fraction)


if os.environ.get("LEAKBED_PRETEND_GPUS"):
    pretend()


@app.query("gpu")
def gpu(message: Message, context: Context) -> Message:
    said = ConfigRecord(
        {
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES", "all"),
            "caps": caps,
            "device": str(resolve_device("auto")),
            "process": os.getpid(),
        }
    )
    return Message(RecordDict({"said": said}), reply_to=message)
