"""What Leakbed costs, measured beside alternatives: run each file with ``python -m``."""
