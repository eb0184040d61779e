"""Seconds for the informed ceiling among 1,000 candidates at five levels of noise, on one core.

Everything is in it: candidates' messages, coordinates, draws (4 for each of 1,000 truths).

Run: python -m benchmarks.ceilings
"""

from time import perf_counter, process_time

import torch

from defenses import SmashedNoise, WeightNoise
from leakbed.contracts import Protects
from leakbed.contracts.noise_laws import Clean, sent_law
from leakbed.models import Architecture
from leakbed.oracle.ceiling import ceiling, points
from leakbed.oracle.local_training import LocalTraining
from leakbed.oracle.messages import Messages

CANDIDATES, BATCH = 1000, 8
LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0)


def levels(messages: Messages, guesses: tuple[int, ...]) -> list[float]:
    """Return the ceilings at all levels, of the longest list."""
    places = points(messages)
    return [
        ceiling(messages, guesses=guesses, stream=at, level=level, coordinates=places)[
            guesses[-1]
        ].value
        for at, level in enumerate(LEVELS)
    ]


def images() -> torch.Tensor:
    """Return as many random images of digits' shape; what is on them costs no time."""
    return torch.rand(CANDIDATES + 100, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def smashed(cut: int) -> list[float]:
    """Rows of one smashed batch."""
    architecture = Architecture(name="mnistnet", image_shape=(1, 28, 28), num_classes=10, cut=cut)
    with torch.no_grad():
        rows = architecture.bottom(1)(images()[:CANDIDATES])
    clean = Clean(kind=Protects.SMASHED, arrays={Protects.SMASHED: rows})
    return levels(Messages.of_rows(sent_law([SmashedNoise(sigma=1.0)], clean)), (1,))


def update(steps: int) -> list[float]:
    """Updates of one node after some steps of batches of 8."""
    network = Architecture(name="mnistnet", image_shape=(1, 28, 28), num_classes=10).build(1)
    shown = images()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    training = LocalTraining(
        network=network,
        before=before,
        batches=list((CANDIDATES + torch.arange(BATCH * steps)).split(BATCH)),
        images=shown,
        labels=torch.arange(len(shown)) % 10,
        optimiser=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    made, _ = training.of(CANDIDATES, torch.arange(CANDIDATES))
    noise = WeightNoise(form="corrected", clip=1.0, scale=0.003)
    laws = [
        sent_law([noise], Clean(kind=Protects.UPDATE, arrays=one, before=before)) for one in made
    ]
    del made
    return levels(Messages.of(laws), (1, BATCH * steps))


def main() -> None:
    """Print seconds and ceilings."""
    torch.set_num_threads(1)
    cases = {
        "smashed rows, cut 2": lambda: smashed(2),
        "smashed rows, cut 5": lambda: smashed(5),
        "FedAvg, 1 step of 8": lambda: update(1),
        "FedAvg, 5 steps of 8": lambda: update(5),
    }
    for name, case in cases.items():
        wall, cpu = perf_counter(), process_time()
        found = case()
        print(
            f"{name}: {process_time() - cpu:.1f} CPU-s ({perf_counter() - wall:.1f} s), ceilings "
            f"{', '.join(f'{value:.3f}' for value in found)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
