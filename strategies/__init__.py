"""Strategies: the server parts of protocols, one per file, each a Flower ``Strategy``."""
