"""A small Flower app, written as the PyTorch template is: nothing of ours is in it."""
