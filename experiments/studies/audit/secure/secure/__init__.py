"""A small Flower app that aggregates securely: nothing of ours is in it."""
