"""UnSplit's targets per second: all in one stacked optimisation against one at a time.

The other side is the algorithm as its paper writes it, a loop over targets in plain PyTorch; the
tests of the attack hold it to the same loop. One target of that loop takes as long as another, so
it is timed on a few. Run alone with ``python -m benchmarks.unsplit_targets``, or by ``make bench``.
One JSON object a line.

Source: Erdogan, Kupcu, Cicek, *UnSplit*, WPES 2022, https://arxiv.org/abs/2108.09033.
"""

import json
from statistics import median
from time import perf_counter

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attacks.unsplit import UnSplit
from leakbed.contracts import Seat, View
from leakbed.models import Architecture
from leakbed.seeds import derive, generator

RUNS, TARGETS, ALONE = 3, 64, 4
CUTS = (1, 2, 5)  # mnistnet's: before the first pooling, after it, and after the second
ATTACK = UnSplit(outer_steps=5, input_steps=20, model_steps=20)
DIGIT = (1, 28, 28)


def variation(image: Float[Tensor, " 1 channels height width"]) -> Float[Tensor, ""]:
    """Return UnSplit's total variation: squared differences, averaged per direction."""
    _, channels, height, width = image.shape
    down = (image[:, :, 1:] - image[:, :, :-1]).square().sum() / (channels * (height - 1) * width)
    right = (image[..., 1:] - image[..., :-1]).square().sum() / (channels * height * (width - 1))
    return down + right


def literal(
    clone: nn.Module, row: Float[Tensor, " 1 *cut"], layers: Architecture, *, attack: UnSplit
) -> Float[Tensor, " 1 channels height width"]:
    """Return the image the paper's algorithm finds for one target.

    Args:
        clone: The bottom it starts from, which it trains in place.
        row: The target's smashed data.
        layers: Gives the shape of the image.
        attack: The settings.

    Returns:
        The fitted input.
    """
    image = torch.full((1, *layers.image_shape), 0.5, dtype=row.dtype, requires_grad=True)
    on_image = torch.optim.Adam([image], lr=attack.input_rate, amsgrad=True)
    on_clone = torch.optim.Adam(clone.parameters(), lr=attack.model_rate, amsgrad=True)
    for _ in range(attack.outer_steps):
        for _ in range(attack.input_steps):
            on_image.zero_grad()
            loss = nn.functional.mse_loss(clone(image), row)
            loss = loss + attack.tv * variation(image) + attack.l2 * image.square().mean()
            loss.backward()
            on_image.step()
        for _ in range(attack.model_steps):
            on_clone.zero_grad()
            nn.functional.mse_loss(clone(image), row).backward()
            on_clone.step()
    return image.detach()


def smashed_rows(layers: Architecture) -> Float[Tensor, " targets *cut"]:
    """Return what a server sees of smooth random images."""
    coarse = torch.rand(TARGETS, 1, 7, 7, generator=generator(8))
    images = nn.functional.interpolate(coarse, DIGIT[1:], mode="bilinear")
    with torch.no_grad():
        rows: Tensor = layers.bottom(1000)(images)
    return rows


def together(smashed: Float[Tensor, " targets *cut"], layers: Architecture) -> float:
    """Return the attack's targets per second."""
    view = View(
        seat=Seat.SERVER,
        image_shape=DIGIT,
        num_classes=10,
        targets=TARGETS,
        smashed=smashed,
        architecture=layers,
    )
    started = perf_counter()
    ATTACK.run(view, seed=0)
    return TARGETS / (perf_counter() - started)


def one_by_one(smashed: Float[Tensor, " targets *cut"], layers: Architecture) -> float:
    """Return the loop's targets per second."""
    started = perf_counter()
    for target, row in enumerate(smashed[:ALONE].split(1)):
        literal(layers.bottom(derive(0, f"clone/{target}")), row, layers, attack=ATTACK)
    return ALONE / (perf_counter() - started)


def measured(cut: int) -> dict[str, object]:
    """Return one line: both sides in turn, and the medians."""
    layers = Architecture(name="mnistnet", image_shape=DIGIT, num_classes=10, cut=cut)
    smashed = smashed_rows(layers)
    pairs = [(together(smashed, layers), one_by_one(smashed, layers)) for _ in range(RUNS)]
    return {
        "name": f"UnSplit, mnistnet cut {cut}: {TARGETS} targets at once / one at a time",
        "ours": round(median(a for a, _ in pairs), 2),
        "other": round(median(b for _, b in pairs), 2),
        "ratio": round(median(a / b for a, b in pairs), 2),
        "unit": "targets/s",
        "runs": RUNS,
    }


def main() -> None:
    """Measure every cut on one thread and print the lines."""
    torch.set_num_threads(1)
    for cut in CUTS:
        print(json.dumps(measured(cut)), flush=True)


if __name__ == "__main__":
    main()
