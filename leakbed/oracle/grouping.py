"""Groups without names: which labels they would be if somebody named them as well as can be.

An attack that knows no label at all may still say which samples share one. Its score is the share
of samples that are right under the one-to-one naming which makes most of them right. No attacker
has that naming, so the score is an upper bound on what the groups are worth under any other such
naming; an attacker that gives two groups one label may be right more often. Baselines are named in
the same way, since the best naming flatters groups that mean nothing too.
"""

import torch
from jaxtyping import Bool, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

BOUND = (
    "an upper bound: clusters have the best one-to-one names there are, which no attacker knows; "
    "only naming two clusters alike could be right more often"
)
"""What a card says beside such a score."""


def best_named(
    clusters: Int[Tensor, " targets rows"], labels: Int[Tensor, " targets rows"]
) -> Bool[Tensor, " targets rows"]:
    """Return which samples are right when each cluster has the best name.

    Args:
        clusters: Any numbers; samples of one number are one group.
        labels: The true ones.

    Returns:
        Hits and misses; of more clusters than labels, those without a name miss.
    """
    groups, own = clusters.unique(return_inverse=True)
    names, true = labels.unique(return_inverse=True)
    pairs = (own * len(names) + true).flatten()
    shared = torch.bincount(pairs, minlength=len(groups) * len(names))
    table = shared.reshape(len(groups), len(names))
    rows, columns = linear_sum_assignment(table.cpu().numpy(), maximize=True)
    named = torch.full((len(groups),), -1, device=true.device)
    named[torch.from_numpy(rows)] = torch.from_numpy(columns).to(named)
    hits: Tensor = named[own] == true
    return hits
