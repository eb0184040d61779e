"""Running an experiment: train each run once, attack it, write a card for each cell."""
