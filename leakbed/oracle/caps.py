"""What a claim of differential privacy, or a linear bottom, allows before any message is read.

A cap stands beside a ceiling. The ceiling is of these candidates and this noise; the cap follows
from a claim and holds for whatever candidates. A ceiling above it says that the claim does not
cover the message; a ceiling below it proves nothing.

**Which mu.** Each message is compared with one reference that says nothing of the data, so mu is
the clipping norm over the noise's deviation, although two messages may be twice as far apart.

Source: Hayes, Mahloujifar, Balle, "Bounding Training Data Reconstruction in DP-SGD", NeurIPS 2023,
https://arxiv.org/abs/2302.07225; lists of guesses, classes of unequal shares and the bound from
(epsilon, delta) are derived here, and tested against mechanisms that reach them.
"""

from math import exp, inf, log, sqrt

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from leakbed.contracts.noise_laws import Channel


def cap(mu: float, *, chance: float) -> float:
    """Return what mu-Gaussian DP allows: a guess of the given chance is right no more often.

    Of a list of guesses take the list's chance. Of labels guessed by a seat that holds the inputs,
    take kappa, the accuracy of the best classifier that reads no message: the bound is concave in
    the chance, so it holds on the mean over inputs although some are easier than others. Kappa must
    not be too low: a classifier that was trained gives a lower limit of it, and 1 is always safe.

    Args:
        mu: The clipping norm over the noise's deviation, not below 0.
        chance: Of the same guess without the message, in (0, 1].

    Returns:
        In (0, 1].

    Raises:
        ValueError: If a number is out of its range.
    """
    _check(chance)
    if not mu >= 0:
        raise ValueError(f"mu is {mu}; it is a norm over a deviation, 0 at least")
    if chance >= 1:
        return 1.0
    return float(norm.cdf(norm.ppf(chance) + mu))


def budget_cap(epsilon: float, delta: float, *, chance: float) -> float:
    """Return what (epsilon, delta) alone allows a guess of the given chance.

    Being right is an event whose chance grows by ``e^epsilon`` and ``delta`` at most, and so is
    being wrong.

    Args:
        epsilon: Not below 0; may be infinite.
        delta: In [0, 1].
        chance: As for :func:`cap`; of classes with unequal shares, that of the likeliest.

    Returns:
        In (0, 1].

    Raises:
        ValueError: If a number is out of its range.
    """
    _check(chance)
    if not (epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(f"got epsilon {epsilon} and delta {delta}; give 0 or more, and 0 to 1")
    if epsilon == inf:
        return 1.0
    wrong = exp(-epsilon) * (1 - delta - chance)
    return min(1.0, delta + exp(min(epsilon, 700.0)) * chance, 1 - max(wrong, 0.0))


def class_cap(mu: float, prior: Float[Tensor, " classes"]) -> float:
    """Return what mu-Gaussian DP allows a guess among classes of known shares.

    Without the message a guess names class c with some chance q_c; with it, it names c rightly with
    ``g(q_c)`` at most. The shares times that are largest where their slopes are equal, which is one
    threshold for all.

    Args:
        mu: As for :func:`cap`.
        prior: Share of each class; they add up to 1.

    Returns:
        In (0, 1]; of equal shares what :func:`cap` says of one class.
    """
    shares = [float(each) for each in prior if each > 0]
    if mu == 0 or len(shares) == 1:
        return max(shares)
    places = [log(each) / mu for each in shares]

    def spare(threshold: float) -> float:
        return float(sum(norm.cdf(place + threshold) for place in places)) - 1

    far = max(map(abs, places)) + 40
    found = float(brentq(spare, -far, far))
    return float(
        sum(
            share * norm.cdf(place + found + mu)
            for share, place in zip(shares, places, strict=True)
        )
    )


def budget_of(channel: Channel) -> float:
    """Return the epsilon of labels that are answered at random, by the answers' own chances.

    Args:
        channel: How labels are answered.

    Returns:
        The largest log-ratio of an answer's chances; infinite where a label is never answered so.
    """
    answers = channel.answers.double()
    ever = answers[:, answers.sum(0) > 0]
    if (ever == 0).any():
        return inf
    return float((ever.max(0).values / ever.min(0).values).log().max())


def reconstruction_floor(
    inputs: Float[Tensor, " rows *input"],
    messages: Float[Tensor, " rows entries"],
    sigma: float,
) -> float:
    """Return the least mean squared error per number with which rows are reconstructed linearly.

    Of a linear bottom W, data of covariance S and normal noise the least error is
    ``tr(S - S W' (W S W' + sigma^2 I)^-1 W S) / d``, which ridge regression reaches. For normal
    data no reconstruction of any kind has a smaller one; for others a nonlinear one may. S is that
    of the given rows, so the floor is of a row drawn from them.

    ``S``, ``W S`` and ``W S W'`` are products of the rows and their messages, so W is not needed,
    and of n rows one matrix of n x n is enough.

    Args:
        inputs: What is to be reconstructed.
        messages: What a linear (or affine) bottom makes of each, without noise.
        sigma: Deviation of the noise on every entry, above 0.

    Returns:
        In squared units of the inputs.

    Raises:
        ValueError: If there is no noise.
    """
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}; without noise a linear bottom is inverted by its rank")
    rows = inputs.flatten(1).double()
    rows = rows - rows.mean(0)
    sent = messages.double()
    sent = (sent - sent.mean(0)) / (sigma * sqrt(len(rows)))
    noisy = sent @ sent.T + torch.eye(len(rows), dtype=torch.float64)
    left = torch.linalg.solve(noisy, rows)
    return float((rows * left).sum()) / rows.numel()


def _check(chance: float) -> None:
    if not 0 < chance <= 1:
        raise ValueError(f"a chance of {chance} is none; give one above 0 and at most 1")
