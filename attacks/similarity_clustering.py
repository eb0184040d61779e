"""Similarity attack by clustering: samples fall into as many groups as labels, then get names.

k-means groups cut gradients by direction, or smashed data by distance; a few known samples say
which group is which label (Hungarian assignment of how many known samples each pair shares). Groups
average what single samples say, so noise hurts less than it hurts the nearest known sample.

Source: Liu, Lyu, Cui, Tao, *Similarity-Based Label Inference Attack Against Training and Inference
of Split Learning*, IEEE TIFS 2024, https://arxiv.org/abs/2203.05222, and its code,
https://github.com/ZeroWalker10/sl_similarity_label_inference.

Departures:
- A group that no known sample names takes the label of the known sample nearest to its centre.
  Published: another random label for every sample in it (``unmatched = "random"``).
- With no known label at all the guess is the groups themselves: the harness scores them under the
  best one-to-one naming, which no attacker has, and says that this is an upper bound.
- Known samples are never scored. Published: scored, for gradients and for smashed training data.
- Rows wider than ``width`` are reduced by an SVD, see :mod:`attacks.similarity`, and many rows are
  clustered in mini-batches.
- Known smashed data are of the attacked set itself; published code takes them from the training set
  and fits a PCA to each set, which mixes two bases.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits
from torch import Tensor

from attacks.similarity import LabelledRows, SimilaritySettings
from leakbed.contracts import Guess, Knowledge, ThreatModel, UnfitViewError, View
from leakbed.naming import unknown
from leakbed.seeds import derive, generator

STARTS = ("published", "k-means++", "known")
UNMATCHED = ("nearest-known", "random")
_BATCH = 4096  # rows of a mini-batch
_STARTS = 10  # of k-means++, published; the tightest clustering is kept


@dataclass(frozen=True, kw_only=True)
class SimilarityClustering(SimilaritySettings):
    """Label inference by clusters that known samples name.

    Attributes:
        clusters: How many; by default one for each class (with ``partial``, each known class).
        start: Where k-means starts: ``"k-means++"``, the ``"known"`` samples, or as
            ``"published"``: from the known ones for smashed data and k-means++ for cut gradients.
        unmatched: What names a cluster without a known sample of its own: ``"nearest-known"`` or,
            published, ``"random"``.
        mini_batch_above: Rows from which on they are clustered in mini-batches.
    """

    clusters: int | None = None
    start: str = "published"
    unmatched: str = "nearest-known"
    mini_batch_above: int = 10_000

    name: ClassVar[str] = "similarity-clustering"
    source: ClassVar[str] = "Liu et al., IEEE TIFS 2024, https://arxiv.org/abs/2203.05222"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is none of its legal values.
        """
        super().__post_init__()
        if self.start not in STARTS:
            raise ValueError(unknown("start", self.start, STARTS))
        if self.unmatched not in UNMATCHED:
            raise ValueError(unknown("unmatched", self.unmatched, UNMATCHED))
        if self.clusters is not None and self.clusters < 1:
            raise ValueError(f"clusters is {self.clusters}; there must be one or more")

    @property
    def threat(self) -> ThreatModel:
        """A party that holds no labels, but may know a few of its samples' own."""
        return ThreatModel(
            seat=self.party(),
            evidence=self.reads(),
            needs=frozenset({Knowledge.KNOWN_LABELS}),
        )

    def run(self, view: View, *, seed: int) -> Guess:
        """Guess the label of every sample, or which samples share one.

        Args:
            view: With the messages of ``evidence`` and ``known_labels``.
            seed: Starts the reduction of wide rows and k-means, and draws random names.

        Returns:
            Labels, or without any known label clusters; the distance to the own cluster's centre as
            objective.
        """
        found = self.read(view, seed=seed, name=self.name)
        known_classes = len(found.labels.unique())
        count = self.clusters or (known_classes if self.partial else 0) or view.num_classes
        places, centres = self._grouped(found, count, seed=derive(seed, "k-means"))
        failed = ~found.usable
        distances = found.spread((found.rows - centres[places]).norm(dim=1), missing=torch.inf)
        if known_classes == 0:
            clusters = found.spread(places, missing=0.0)[:, None]
            return Guess(clusters=clusters, objective=distances, failed=failed)
        names = named(places, centres, found, fill=self.unmatched == "nearest-known")
        labels = names[places]
        drawn = generator(derive(seed, "unmatched"))
        guesses = torch.randint(view.num_classes, labels.shape, generator=drawn).to(labels)
        labels = torch.where(labels < 0, guesses, labels)
        labels = found.spread(labels, missing=0.0)[:, None]
        return Guess(labels=labels, objective=distances, failed=failed)

    def _grouped(
        self, found: LabelledRows, count: int, *, seed: int
    ) -> tuple[Int[Tensor, " usable"], Float[Tensor, " count features"]]:
        """Return the cluster of each row, and the clusters' centres."""
        from sklearn.cluster import KMeans, MiniBatchKMeans  # noqa: PLC0415  a second to import

        if count > len(found.rows):
            raise UnfitViewError(
                f"{len(found.rows)} usable samples cannot make {count} clusters; attack more "
                "targets, or set clusters"
            )
        settings = {"n_clusters": count, "random_state": seed % 2**32, **self._start(found, count)}
        if len(found.rows) > self.mini_batch_above:
            fit = MiniBatchKMeans(batch_size=_BATCH, **settings)
        else:
            fit = KMeans(**settings)
        rows = found.rows.cpu().numpy()
        with threadpool_limits(1):  # threads add up in any order: same seed, same bits
            places = torch.from_numpy(fit.fit_predict(rows)).long()
        centres = torch.from_numpy(fit.cluster_centers_)
        return places.to(found.labels), centres.to(found.rows)

    def _start(self, found: LabelledRows, count: int) -> dict[str, object]:
        """Return where k-means starts, as its own settings."""
        known = found.labels.unique()
        asked = self.start == "known" or (self.start == "published" and self.evidence == "smashed")
        if asked and len(known) == count:
            own = [found.rows[found.known[found.labels == label]].mean(0) for label in known]
            return {"init": torch.stack(own).cpu().numpy(), "n_init": 1}
        if self.start == "known":
            raise UnfitViewError(
                f"start = 'known' starts one cluster for each known class; {len(known)} are known "
                f"and {count} clusters wanted"
            )
        return {"init": "k-means++", "n_init": _STARTS}


def named(
    places: Int[Tensor, " usable"],
    centres: Float[Tensor, " count features"],
    found: LabelledRows,
    *,
    fill: bool,
) -> Int[Tensor, " count"]:
    """Return the label of each cluster.

    Each label names one cluster at most, so that together they cover as many known samples as can
    be. Where that leaves a cluster without a name, it shares no known sample with a free label.

    Args:
        places: The cluster of each row.
        centres: The clusters' centres.
        found: The rows, of which at least one is labelled.
        fill: Name the others by the known sample nearest to their centre.

    Returns:
        Labels; -1 where a cluster stays without a name.
    """
    labels = found.labels.unique()
    own = places[found.known]
    shared = torch.stack(
        [torch.bincount(own[found.labels == label], minlength=len(centres)) for label in labels], 1
    )
    clusters, columns = linear_sum_assignment(shared.cpu().numpy(), maximize=True)
    names = torch.full((len(centres),), -1, device=labels.device)
    for cluster, column in zip(clusters.tolist(), columns.tolist(), strict=True):
        if shared[cluster, column] > 0:
            names[cluster] = labels[column]
    if fill:
        nearest = found.labels[torch.cdist(centres, found.rows[found.known]).argmin(1)]
        names = torch.where(names < 0, nearest, names)
    return names
