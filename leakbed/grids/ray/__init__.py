"""RayGrid: nodes on Ray actors."""
