"""A leak gate: hold the results of an audit against limits, for a pipeline that releases an app.

Three verdicts: ``pass``, ``fail`` and ``not evaluable``; what could not be measured never passes. A
limit is held against the end of the interval that leaks more, and of measures that are continuous a
record (SSIM, MSE) against the worst record too. What is written holds no picture and no raw value.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from experiments.results.cards import Card, read_cards
from leakbed import __version__
from leakbed.lookup import unknown_name
from leakbed.oracle.metrics import HIGHER_LEAKS_MORE, SSIM_WINDOW

PASS, FAIL, NOT_EVALUABLE = "pass", "fail", "not evaluable"
EXIT_CODES = {PASS: 0, FAIL: 1, NOT_EVALUABLE: 3}
"""How ``leakbed gate`` ends; 2 is bad input, as everywhere."""
_NORMAL = 1.96  # standard errors of a 95 % interval
_GUESSES_NONE = "the attack guesses none"
_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


class GateError(ValueError):
    """Limits that mean nothing, or results that cannot be judged."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One limit held against one result.

    Attributes:
        card: Key of the result's card; empty where there was none.
        attack: Its attack.
        metric: What was limited.
        limit: Its limit.
        end: The end of the interval that leaks more, None where there is none.
        worst: The record that leaks most, of measures that are continuous a record.
        verdict: ``pass``, ``fail`` or ``not evaluable``.
        why: In words.
    """

    card: str
    attack: str
    metric: str
    limit: float
    end: float | None
    worst: float | None
    verdict: str
    why: str

    def line(self) -> str:
        """Return it as one line."""
        return f"{self.verdict}: {self.attack or 'every attack'}: {self.metric}: {self.why}"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A whole folder of results held against limits.

    Attributes:
        verdict: The worst of all findings: ``fail``, else ``not evaluable``, else ``pass``.
        findings: Of every limit and result.
        filed: What a release officer files: app, hashes, scope, versions, mitigations, time, who
            decides.
    """

    verdict: str
    findings: Sequence[Finding]
    filed: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``gate.json``, ``gate.xml`` (JUnit) and ``gate.sarif`` (SARIF 2.1.0).

        Args:
            folder: Made if absent.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gate.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        (folder / "gate.sarif").write_text(json.dumps(self._sarif(), indent=1) + "\n")
        ET.ElementTree(self._junit()).write(
            folder / "gate.xml", encoding="utf-8", xml_declaration=True
        )

    def _sarif(self) -> dict[str, Any]:
        """Return what was not passed, as a code scanner says it."""
        levels = {FAIL: "error", NOT_EVALUABLE: "warning"}
        metrics = sorted({each.metric for each in self.findings})
        results = [
            {
                "ruleId": f"leakbed/{each.metric}",
                "level": levels[each.verdict],
                "message": {"text": each.line()},
                "locations": [
                    {"physicalLocation": {"artifactLocation": {"uri": "pyproject.toml"}}}
                ],
                "partialFingerprints": {"leakbed/v1": f"{each.attack}/{each.metric}"},
            }
            for each in self.findings
            if each.verdict in levels
        ]
        rules = [
            {"id": f"leakbed/{name}", "shortDescription": {"text": f"leakage: {name}"}}
            for name in metrics
        ]
        driver = {"name": "leakbed", "version": __version__, "rules": rules}
        run = {"tool": {"driver": driver}, "results": results}
        return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}

    def _junit(self) -> ET.Element:
        """Return one test case a finding; what could not be measured is an error, not a pass."""
        counted = {name: sum(f.verdict == name for f in self.findings) for name in EXIT_CODES}
        suite = ET.Element(
            "testsuite",
            name="leakbed gate",
            tests=str(len(self.findings)),
            failures=str(counted[FAIL]),
            errors=str(counted[NOT_EVALUABLE]),
        )
        for each in self.findings:
            name = f"{each.metric} within {each.limit:g}"
            case = ET.SubElement(suite, "testcase", classname=each.attack, name=name)
            if each.verdict != PASS:
                kind = "failure" if each.verdict == FAIL else "error"
                ET.SubElement(case, kind, message=each.why)
        return suite


def gate(
    results: Path,
    *,
    most: Mapping[str, float],
    least: Mapping[str, float],
    baseline: Path | None = None,
    decides: str = "not named",
) -> Judged:
    """Judge a folder of results.

    Args:
        results: Of an audit, an attack or a run.
        most: Limits of measures of which more is more leakage, such as ``identification``.
        least: Of measures of which less is more leakage, such as ``mse``.
        baseline: Earlier results; each measure that is limited nowhere else may leak no more than
            the interval of the same attack there.
        decides: Who decides by this verdict, for the file.

    Returns:
        The verdict with its findings.

    Raises:
        GateError: There is no limit, or one that means nothing.
    """
    _check(most, least)
    limits = {**most, **least}
    if not limits and baseline is None:
        raise GateError("nothing limits the leakage; give --max, --min or --baseline")
    cards = [card for card in read_cards(results) if card.status != "unfit"]
    findings = [_held(card, metric, limits[metric]) for metric in limits for card in cards]
    findings += [_nothing(metric, limits[metric]) for metric in limits if not cards]
    if baseline is not None:
        findings += _beside(cards, read_cards(baseline), set(limits))
    findings = _one_that_has_it(findings)
    verdicts = {each.verdict for each in findings}
    verdict = next((v for v in (FAIL, NOT_EVALUABLE) if v in verdicts), PASS if findings else "")
    return Judged(
        verdict=verdict or NOT_EVALUABLE, findings=findings, filed=_filed(results, cards, decides)
    )


def _check(most: Mapping[str, float], least: Mapping[str, float]) -> None:
    for given, more, option, other in ((most, True, "max", "min"), (least, False, "min", "max")):
        for metric in given:
            if metric not in HIGHER_LEAKS_MORE:
                raise GateError(unknown_name("measure", metric, HIGHER_LEAKS_MORE))
            if HIGHER_LEAKS_MORE[metric] is not more:
                what = "less" if more else "more"
                raise GateError(
                    f"--{option} {metric}: {what} of {metric} is more leakage; use --{other}"
                )


def _summary(card: Card, metric: str) -> dict[str, Any] | None:
    found = card.scores.get(metric)
    return found if isinstance(found, dict) and found.get("mean") is not None else None


def _ends(summary: Mapping[str, Any], metric: str) -> tuple[float | None, float | None]:
    """Return the end of the interval that leaks more, and the worst record of a continuous one."""
    more = HIGHER_LEAKS_MORE[metric]
    if summary.get("interval"):
        low, high = summary["interval"]
        return float(high if more else low), None
    values = [value for value in summary.get("values") or () if value is not None]
    worst = (max if more else min)(values) if values else None
    if summary.get("stderr") is None:
        return None, worst
    wide = _NORMAL * float(summary["stderr"])
    return float(summary["mean"]) + (wide if more else -wide), worst


def _held(card: Card, metric: str, limit: float) -> Finding:
    """Hold one limit against one result."""
    summary = _summary(card, metric)
    end, worst = (None, None) if summary is None else _ends(summary, metric)
    verdict, why = _judged(card, summary, metric, limit, end, worst)
    return Finding(
        card=card.key,
        attack=card.attack,
        metric=metric,
        limit=limit,
        end=end,
        worst=worst,
        verdict=verdict,
        why=why,
    )


def _judged(  # noqa: PLR0917  what one sentence is made of
    card: Card,
    summary: Mapping[str, Any] | None,
    metric: str,
    limit: float,
    end: float | None,
    worst: float | None,
) -> tuple[str, str]:
    """Return a verdict and its reason; what leaks too much fails even if it is badly measured."""
    if summary is None:
        return NOT_EVALUABLE, _why_unmeasured(card, metric)
    more = HIGHER_LEAKS_MORE[metric]
    measured = {"the mean": summary["mean"], "the interval's end": end, "the worst record": worst}
    for name, value in measured.items():
        if value is not None and (value > limit if more else value < limit):
            return FAIL, f"{name} is {value:.3g}, the limit {limit:g}"
    if reason := card.budget_bound or card.unreliable:
        return NOT_EVALUABLE, reason
    if end is None:
        return NOT_EVALUABLE, "one target has no interval; attack more messages"
    return PASS, f"the interval ends at {end:.3g}, the limit is {limit:g}"


def _why_unmeasured(card: Card, metric: str) -> str:
    if card.status != "done":
        return "the attack was not scored"
    if metric.startswith("ssim") and "mse" in card.scores:
        return f"images smaller than {SSIM_WINDOW} x {SSIM_WINDOW} pixels have none"
    return _GUESSES_NONE


def _nothing(metric: str, limit: float) -> Finding:
    why = "no attack fits the messages"
    nothing: dict[str, Any] = {"card": "", "attack": "", "end": None, "worst": None}
    return Finding(metric=metric, limit=limit, verdict=NOT_EVALUABLE, why=why, **nothing)


def _one_that_has_it(findings: Sequence[Finding]) -> list[Finding]:
    """Leave out attacks that do not guess what is limited, if another one does."""
    guessed = {each.metric for each in findings if each.why != _GUESSES_NONE}
    return [f for f in findings if f.metric not in guessed or f.why != _GUESSES_NONE]


def _beside(cards: Sequence[Card], earlier: Sequence[Card], limited: set[str]) -> list[Finding]:
    """Hold every result against the interval of the same attack in earlier ones."""
    found = []
    for old in earlier:
        same = [
            card for card in cards if (card.attack, card.protocol) == (old.attack, old.protocol)
        ]
        for metric in sorted(set(HIGHER_LEAKS_MORE) & set(old.scores) - limited):
            summary = _summary(old, metric)
            if summary is None:
                continue
            end, _ = _ends(summary, metric)
            limit = float(summary["mean"]) if end is None else end
            found += [_mean_held(card, metric, limit) for card in same] or [_nothing(metric, limit)]
    return found


def _mean_held(card: Card, metric: str, limit: float) -> Finding:
    """Hold the mean of a result against an earlier interval: worst records vary by themselves."""
    summary = _summary(card, metric)
    mean = None if summary is None else float(summary["mean"])
    verdict, why = NOT_EVALUABLE, "the attack was not scored"
    if mean is not None:
        worse = mean > limit if HIGHER_LEAKS_MORE[metric] else mean < limit
        verdict, why = (FAIL if worse else PASS), f"the mean is {mean:.3g}, earlier {limit:.3g}"
        if not worse and (reason := card.budget_bound or card.unreliable):
            verdict, why = NOT_EVALUABLE, reason
    return Finding(
        card=card.key,
        attack=card.attack,
        metric=metric,
        limit=limit,
        end=mean,
        worst=None,
        verdict=verdict,
        why=why,
    )


def _filed(results: Path, cards: Sequence[Card], decides: str) -> dict[str, Any]:
    """Return what is filed with a verdict."""
    audit = results / "audit.json"
    said = json.loads(audit.read_text()) if audit.is_file() else {}
    return {
        "app": said.get("app"),
        "hashes": said.get("hashes", {}),
        "found": said.get("leaks", []),
        "assumed": said.get("assumed", []),
        "scope": {
            "attacks": sorted({card.attack for card in cards}),
            "attacks that do not fit": said.get("unfit", {}),
            "data": sorted({card.data for card in cards}),
            "models": sorted({card.model for card in cards}),
            "nodes": sorted({card.nodes for card in cards}),
            "rounds": sorted({card.exposure.round for card in cards if card.exposure}),
        },
        "mitigations": sorted({card.defense for card in cards}),
        "versions": {
            "leakbed": __version__,
            "source": sorted({card.source for card in cards}),
            "python": platform.python_version(),
            **{name: version(name) for name in ("flwr", "torch")},
        },
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "decides": decides,
    }
