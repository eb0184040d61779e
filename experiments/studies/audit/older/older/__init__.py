"""A small Flower app of the older kind, with a NumPyClient: nothing of ours is in it."""
