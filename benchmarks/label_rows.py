"""An epoch of cut gradients clustered and scored: rows narrowed first against rows as they are.

Rows are planted: a direction for each label, and as much noise of its own. They are made chunk by
chunk, since a copy of them would be another gigabyte. Run alone with
``python -m benchmarks.label_rows``; one JSON object a line, times first and then memory.
"""

from time import perf_counter

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from attacks.similarity_clustering import SimilarityClustering
from benchmarks.paired import line, show
from experiments.results.cards import peak_memory
from leakbed.contracts import Seat, View
from leakbed.oracle import Truth, baselines, score
from leakbed.seeds import generator

ROWS, WIDTH, CLASSES = 60_000, 4_096, 10
CHUNK = 2_000
NOISE = 1.0  # length of a row's own noise, over that of its label's direction
THREADS = 2


def planted() -> tuple[Float[Tensor, " rows width"], Int[Tensor, " rows"]]:
    """Return an epoch of gradients and the label behind each."""
    stream = generator(60)
    labels = torch.randint(CLASSES, (ROWS,), generator=stream)
    directions = normalize(torch.randn(CLASSES, WIDTH, generator=stream), dim=1)
    rows = torch.empty(ROWS, WIDTH)
    for part, own in zip(rows.split(CHUNK), labels.split(CHUNK), strict=True):
        torch.randn(part.shape, generator=stream, out=part)
        part.mul_(NOISE / WIDTH**0.5).add_(directions[own])
    return rows, labels


def attacked(
    rows: Float[Tensor, " rows width"], labels: Int[Tensor, " rows"], attack: SimilarityClustering
) -> tuple[float, float]:
    """Return the rows clustered and scored per second, and the share of right labels."""
    started = perf_counter()
    first = torch.stack([(labels == label).nonzero()[0, 0] for label in range(CLASSES)])
    known = torch.full_like(labels, -1)
    known[first] = labels[first]
    view = View(
        seat=Seat.CLIENT,
        image_shape=(1, 1, 1),
        num_classes=CLASSES,
        targets=len(rows),
        cut_gradient=rows,
        known_labels=known[:, None],
    )
    guess = attack.run(view, seed=0)
    blank = torch.zeros(len(rows), 1, 1, 1, 1)
    truth = Truth(
        images=blank,
        labels=labels[:, None],
        num_classes=CLASSES,
        candidates=blank[:, 0],
        positions=torch.arange(len(rows))[:, None],
    )
    scores = score(guess, truth, baselines=baselines(truth, unordered_labels=True))
    return len(rows) / (perf_counter() - started), scores.metrics["label_accuracy"].mean


def main() -> None:
    """Measure and print the lines.

    Raises:
        RuntimeError: If a side misses labels that are plain to see: its speed is worth nothing.
    """
    torch.set_num_threads(THREADS)
    rows, labels = planted()
    size = rows.numel() * rows.element_size()
    ours, right = attacked(rows, labels, SimilarityClustering())
    peak = peak_memory()
    drawn, found = attacked(rows, labels, SimilarityClustering(reduction="random-projection"))
    other, also = attacked(rows, labels, SimilarityClustering(reduction="none"))
    if min(right, found, also) < 0.99:  # noqa: PLR2004  k-means may stop between labels, not here
        shares = ", ".join(f"{share:.1%}" for share in (right, found, also))
        raise RuntimeError(f"{shares} of planted labels found; expected all")
    what = f"{ROWS:,} gradients of {WIDTH:,} numbers"
    for side, speed in (("by SVD", ours), ("by random projection", drawn)):
        name = f"{what} clustered and scored: narrowed {side} / whole"
        show(line(name, [(speed, other)], unit="rows/s"))
    show(line(f"{what}: most memory / the rows alone", [(peak, size)], unit="bytes"))


if __name__ == "__main__":
    main()
