"""Clients: what nodes run. One handler family per file, all registered on one ClientApp."""

from flwr.clientapp import ClientApp

from clients import cell, head, split, weights
from leakbed.mods import defend

# Flower binds mods when a handler is registered, so the cell's defences are looked up at call time.
node_app = ClientApp(mods=[cell.one_torch_thread, defend(cell.cell_defenses)])
for family in (cell, weights, split, head):
    family.register(node_app)

__all__ = ["node_app"]
