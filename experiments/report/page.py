"""The report of a results folder: one self-contained HTML file for the owner of the private data.

It reads the cards, the guesses and the truths that a run left. First come three sentences and one
figure, of accuracy against leakage; then the pictures; tables and text are folded away below them.
The file loads nothing, runs nothing and is readable by its owner only.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from experiments.report.caveats import doubts
from experiments.report.detection import COLUMNS, detectors
from experiments.report.figures import charts, legend
from experiments.report.findings import conclusions as say
from experiments.report.opening import opening, panels
from experiments.report.pictures import Block, blocks, samples
from experiments.report.rows import FAMILY_IN_WORDS, Row, cells, family, read_last_run, versions
from experiments.report.tables import matrices, setting, stolen, tables
from experiments.report.template import PAGE, STYLE
from experiments.results.cards import Card, written_whole
from experiments.results.folder import left_out
from leakbed import __version__

Conclusions = Callable[..., list[str]]

GLOSSARY: tuple[tuple[str, str], ...] = (
    (
        "identification",
        "Share of reconstructions nearer to their own original than to any other private image "
        "among the candidates. Higher leaks more; 0% means that nobody is recognised.",
    ),
    (
        "|Pearson|",
        "Correlation of a reconstruction with its original, whatever the brightness, contrast or "
        "polarity, from 0 to 1. Higher leaks more. It finds shapes that raw errors call failures.",
    ),
    (
        "SSIM, and its skill",
        "Structural similarity, at most 1; higher leaks more: the common form, the mean over the "
        "11 x 11 windows that lie within the image, so that it stands beside published numbers; "
        "smaller images have none. Another image of the same kind scores above 0, so the skill "
        "gives the share of the way from the best evidence-free guess (0) to a perfect one (1); "
        "below 0, the attack did worse than guessing.",
    ),
    (
        "label accuracy",
        "Share of private labels that were guessed. Higher leaks more; compare with chance and "
        "with always guessing the commonest label. Where one label is much commoner than others, "
        "the balanced label accuracy stands beside it: the share of each label's samples that were "
        "guessed, averaged over the labels, of which guessing gets one over their number. A party "
        "that owns its inputs can also classify them without any message, by the labels it knows "
        "or by public images, and an untrained network shows what inputs look like: only what lies "
        "above the best of these does the protocol give away.",
    ),
    (
        "MSE, PSNR, affine MSE",
        "Mean squared error (lower leaks more); the same in decibels with peak 1 (higher leaks "
        "more); the error after the best map of intensities (lower leaks more).",
    ),
    (
        "ceiling",
        "How often the best possible guess names the row behind a message, among as many "
        "candidates as its card says; of a message of several rows a list of as many names. Its "
        "guesser knows all but the row and the noise, which is more than any server knows of a "
        "bottom that it does not hold. A card with more hits, by chance less than .001, is marked.",
    ),
    (
        "baselines",
        "What a guess scores that read no message: a constant image, the mean image, another "
        "sample, chance, the commonest label. The nearest public image looks at the truth to "
        "choose, so it is shown as what owning the distribution is worth and never enters a skill.",
    ),
    (
        "control",
        "The same guesses scored against samples they were not made from. They must stay within "
        "two standard errors of the baselines; otherwise the score measures something else.",
    ),
    (
        "detectors",
        "Alarms that a node raised at its own server, in runs with a hijacker and in honest ones, "
        "each with the exact 95% interval; when the alarm came, and what had been read by then. A "
        "passive attack forges nothing, so a run it reads is an honest one to every detector.",
    ),
    (
        "utility and cost",
        "What was left of the task, and what the run took: seconds of training and of the attack, "
        "bytes from and to the nodes, peak memory.",
    ),
)


_OPENING = 3  # sentences that a report opens with


def write_report(folder: Path, *, conclusions: Conclusions = say) -> Path:
    """Write ``report.html`` into a results folder, whole or not at all.

    Where ``last-run.json`` names the last run's cards, earlier ones are left out. A card that
    cannot be read is a :class:`experiments.results.cards.CardError` that names the file. Guesses
    or truths that are missing or broken are said where their pictures would be.

    Args:
        folder: Holds ``cards``, and beside it ``guesses`` and ``truths``.
        conclusions: Makes the sentences on single results from the cards and their samples; the
            first three stand at the top where :func:`experiments.report.opening.opening` has none.

    Returns:
        The file, readable by its owner only.
    """
    folder = Path(folder)
    last = read_last_run(folder)
    current = last.cards
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
    said = conclusions(current, samples=samples(folder, current))
    lead = opening(current)
    text = page.render(
        _content(folder, current),
        title=last.name,
        ran=_ran(current, [last.written[card.key] for card in current], left_out(folder)),
        warnings=_warnings(current, old=last.older, others=last.others),
        lead=lead or said[:_OPENING],
        sentences=said if lead else said[_OPENING:],
    )
    return _kept(folder / "report.html", text)


def _content(folder: Path, cards: Sequence[Card]) -> dict[str, Any]:
    """Return everything the page shows."""
    found = cells(cards)
    attacked = [cell for cell in found if cell.first.status in {"done", "unscored"}]
    scored = [cell for cell in attacked if cell.first.status == "done"]
    diverged = [cell for cell in found if cell.first.status == "diverged"]
    demo = any(card.demo for card in cards)
    return {
        "style": Markup(STYLE),  # noqa: S704  a constant of ours
        "demo": demo
        and "The budget was cut so that it ends in minutes: few targets, short training, few "
        "steps. The figures show what a report is, not what the attacks can do.",
        "blocks": [_laid(block) for block in blocks(folder, attacked)],
        "charts": [Markup(each.inline()) for each in charts(scored)],  # noqa: S704  matplotlib escapes
        "panels": [Markup(each.inline()) for each in panels(scored)],  # noqa: S704  matplotlib escapes
        "legend": legend(scored),
        "doubted": _doubted(scored),
        "matrices": matrices([*scored, *diverged]),
        "tables": tables(scored),
        "stolen": stolen(scored),
        "detectors": detectors(cards),
        "detector_columns": COLUMNS,
        "threats": _threats(found),
        "unfit": [
            {"name": f"{cell.first.attack}, {setting(cell)}", "why": _why(cell.first)}
            for cell in found
            if cell.first.status != "done"
        ],
        "glossary": GLOSSARY,
        "made": f"Written by Leakbed {__version__} on {_day(datetime.now(tz=UTC))}.",
    }


def _doubted(scored: Sequence[Row]) -> str:
    """Say how many results should not be believed; why stands with them, folded away."""
    count = sum(bool(doubts(cell)) for cell in scored)
    verb = "has a reason" if count == 1 else "have reasons"
    return f"{count} of {len(scored)} results {verb} not to be trusted" if count else ""


def _ran(cards: Sequence[Card], times: Sequence[float], unfit: int) -> str:
    """Say what was run and when, by the times at which the cards were written."""
    first, last = (datetime.fromtimestamp(time, tz=UTC) for time in (min(times), max(times)))
    when = _day(first) if _day(first) == _day(last) else f"{_day(first)} to {_day(last)}"
    families = " and ".join(dict.fromkeys(FAMILY_IN_WORDS[family(card)] for card in cards))
    seeds = len({card.seed for card in cards})
    listed = [
        _listed("network", [card.model for card in cards]),
        _listed("data", [card.data for card in cards]),
        _listed("nodes", [str(card.nodes) for card in cards]),
    ]
    of_seeds = f" of {seeds} seeds" if seeds > 1 else ""
    pairs = "1 more pair" if unfit == 1 else f"{unfit} more pairs"
    rest = f" {pairs} of a case and an attack or a defence cannot fit." if unfit else ""
    ran = f"{families[0].upper()}{families[1:]}; {'; '.join(listed)}"
    return f"{ran}. {_counted(cards)}{of_seeds}, {when}.{rest}"


def _counted(cards: Sequence[Card]) -> str:
    """Count the results, and apart from them what came to none."""
    counts = Counter(card.status for card in cards)
    results = f"{counts['done']} {'result' if counts['done'] == 1 else 'results'}"
    unscored = f", {counts['unscored']} attacked without answers" if counts["unscored"] else ""
    rest = "".join(
        f", {counts[status]} {status}"
        for status in ("failed", "diverged", "unfit")
        if counts[status]
    )
    return f"{results}{unscored}{rest}"


def _listed(name: str, values: Sequence[str]) -> str:
    return f"{name} {', '.join(dict.fromkeys(sorted(values)))}"


def _day(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def _warnings(cards: Sequence[Card], *, old: int, others: int) -> list[str]:
    """Warn of cards that different code or devices made, and of those that are left out."""
    said = []
    if mixed := versions(cards):
        said.append(
            f"Cells whose seeds were computed by several versions of the code: {mixed}. Numbers of "
            "one version are not pooled with another's."
        )
    devices = {card.device["name"] for card in cards if card.device}
    if len(devices) > 1:
        said.append(
            f"These cards were computed on {len(devices)} kinds of device "
            f"({', '.join(sorted(devices))}): equal settings give equal draws on them, but numbers "
            "that agree to rounding only."
        )
    if old:
        said.append(f"{old} older cards of cells that were run again are left out.")
    if others:
        said.append(f"{others} cards of other runs in this folder are left out.")
    return said


def _laid(block: Block) -> Mapping[str, Any]:
    """Return a block of pictures as the page wants it."""
    first = block.strips[0].cell.first
    title = f"{first.model} on {first.data}" if block.originals else "Without originals"
    strips = [
        {
            "attack": strip.cell.first.attack,
            "setting": setting(strip.cell),
            "pictures": strip.pictures,
            "note": strip.note,
        }
        for strip in block.strips
    ]
    return {"title": title, "originals": block.originals, "strips": strips}


def _threats(found: Sequence[Row]) -> list[dict[str, str]]:
    """Return every threat model in words, with the attacks that have it."""
    said: dict[str, dict[str, None]] = {}
    for cell in found:
        if cell.first.threat is not None:
            said.setdefault(cell.first.threat.in_words, {})[cell.first.attack] = None
    return [{"attacks": ", ".join(attacks), "words": words} for words, attacks in said.items()]


def _why(card: Card) -> str:
    if card.status == "unscored":
        return "Attacked without an answer key, so the guesses have no scores."
    why = card.why or ""
    said = {"diverged": "Training diverged: ", "failed": "Failed: "}
    return f"{said.get(card.status, '')}{why}"


def _kept(target: Path, text: str) -> Path:
    """Write a private file, whole or not at all."""
    with written_whole(target) as partial:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    return target
