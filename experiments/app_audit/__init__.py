"""The audit of somebody else's Flower app: run it, attack what it sends, judge the results."""
