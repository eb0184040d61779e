"""The ClientApp that `flwr run` starts on every node."""

from clients import node_app

app = node_app  # Flower checks the source text: the name must be assigned here
