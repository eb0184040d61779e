"""A leak gate passes only what was measured, and says why it does not."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from typer.testing import CliRunner

from experiments.app_audit.gate import FAIL, NOT_EVALUABLE, PASS, GateError, gate
from experiments.cli import app as commands
from experiments.results.cards import Card, write_card

RATE = {"mean": 0.0, "std": None, "stderr": None, "values": [0, 0], "interval": [0.0, 0.4]}
SSIM = {"mean": 0.1, "std": 0.1, "stderr": 0.01, "values": [0.05, 0.6], "interval": None}


def card(folder: Path, *, attack: str = "dlm", key: str = "0", **more: Any) -> Path:
    fields = {
        "status": "done",
        "scores": {"identification": RATE, "ssim": SSIM},
        "baselines": {"grey": {"ssim": 0.1}},
        **more,
    }
    common: dict[str, Any] = {"case": "offline", "protocol": "fedavg", "data": "x", "model": "m"}
    common |= {"nodes": 2, "seed": 0, "version": "1", "source": "s"}
    write_card(Card(key=key * 16, attack=attack, **common, **fields), folder)
    return folder


def verdict(folder: Path, most: dict[str, float], **more: Any) -> str:
    return gate(folder, most=most, least=more.pop("least", {}), **more).verdict


def test_limits_hold_against_the_intervals_end_and_the_worst_record(tmp_path: Path) -> None:
    card(tmp_path)
    assert verdict(tmp_path, {"identification": 0.5}) == PASS
    assert verdict(tmp_path, {"identification": 0.3}) == FAIL, "the mean is 0, its interval is not"
    assert verdict(tmp_path, {"ssim": 0.65}) == PASS
    assert verdict(tmp_path, {"ssim": 0.5}) == FAIL, "one record came back"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"status": "unscored", "scores": {}, "baselines": {}}, "was not scored"),
        ({"stopped_on_budget": 0.5}, "budget-bound"),
        ({"unreliable": "the control fails"}, "the control fails"),
        ({"scores": {"ssim": SSIM}}, "guesses none"),
        ({"scores": {"identification": {**RATE, "interval": None}}}, "no interval"),
    ],
)
def test_what_could_not_be_measured_never_passes(
    tmp_path: Path, more: dict[str, Any], why: str
) -> None:
    judged = gate(card(tmp_path, **more), most={"identification": 0.9}, least={})
    assert judged.verdict == NOT_EVALUABLE
    assert why in judged.findings[0].why


def test_images_too_small_for_ssim_are_not_said_to_be_none(tmp_path: Path) -> None:
    small = {"scores": {"identification": RATE, "mse": SSIM}}
    (found,) = gate(card(tmp_path, **small), most={"ssim": 0.3}, least={}).findings
    assert found.why == "images smaller than 11 x 11 pixels have none"


def test_what_leaks_too_much_fails_however_badly_it_is_measured(tmp_path: Path) -> None:
    assert verdict(card(tmp_path, stopped_on_budget=1.0), {"ssim": 0.05}) == FAIL


def test_without_any_attack_nothing_passes(tmp_path: Path) -> None:
    assert verdict(tmp_path, {"ssim": 0.9}) == NOT_EVALUABLE


def test_an_attack_that_guesses_something_else_is_left_out(tmp_path: Path) -> None:
    card(card(tmp_path), attack="labels", key="1", scores={"label_accuracy": RATE})
    judged = gate(tmp_path, most={"ssim": 0.65}, least={})
    assert [(each.attack, each.verdict) for each in judged.findings] == [("dlm", PASS)]


def test_earlier_results_are_not_to_be_exceeded(tmp_path: Path) -> None:
    old, worse = card(tmp_path / "old"), {**SSIM, "mean": 0.3}
    assert verdict(card(tmp_path / "same"), {}, baseline=old) == PASS
    new = card(tmp_path / "new", scores={"identification": RATE, "ssim": worse})
    judged = gate(new, most={}, least={}, baseline=old)
    assert [each.metric for each in judged.findings if each.verdict == FAIL] == ["ssim"]
    assert verdict(tmp_path / "none", {}, baseline=old) == NOT_EVALUABLE


@pytest.mark.parametrize(
    ("most", "least", "message"),
    [
        ({}, {}, "nothing limits"),
        ({"identfication": 0.1}, {}, "did you mean 'identification'"),
        ({"mse": 0.1}, {}, "less of mse is more leakage; use --min"),
        ({}, {"ssim": 0.1}, "more of ssim is more leakage; use --max"),
    ],
)
def test_limits_that_mean_nothing_are_refused(
    tmp_path: Path, most: dict[str, float], least: dict[str, float], message: str
) -> None:
    with pytest.raises(GateError, match=message):
        gate(tmp_path, most=most, least=least)


def exactly(required: list[str], **properties: Any) -> dict[str, Any]:
    """A JSON schema of an object that has no other properties than those."""
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


WORDS = {"type": "string", "minLength": 1}
SARIF = exactly(
    ["$schema", "version", "runs"],
    **{"$schema": {"type": "string", "pattern": "sarif-2.1.0.json$"}},
    version={"const": "2.1.0"},
    runs={
        "type": "array",
        "minItems": 1,
        "items": exactly(
            ["tool", "results"],
            tool=exactly(
                ["driver"],
                driver=exactly(
                    ["name", "version", "rules"],
                    name=WORDS,
                    version=WORDS,
                    rules={
                        "type": "array",
                        "uniqueItems": True,
                        "items": exactly(
                            ["id", "shortDescription"],
                            id=WORDS,
                            shortDescription=exactly(["text"], text=WORDS),
                        ),
                    },
                ),
            ),
            results={
                "type": "array",
                "items": exactly(
                    ["ruleId", "level", "message", "locations", "partialFingerprints"],
                    ruleId=WORDS,
                    level={"enum": ["none", "note", "warning", "error"]},
                    message=exactly(["text"], text=WORDS),
                    locations={
                        "type": "array",
                        "items": exactly(
                            ["physicalLocation"],
                            physicalLocation=exactly(
                                ["artifactLocation"],
                                artifactLocation=exactly(
                                    # 3.4.4: relative to the root of the sources, with slashes
                                    ["uri"],
                                    uri={"type": "string", "pattern": r"^(?!/|file:)[^\\]+$"},
                                ),
                            ),
                        ),
                    },
                    partialFingerprints={
                        "type": "object",
                        "minProperties": 1,
                        "additionalProperties": {"type": "string"},
                    },
                ),
            },
        ),
    },
)
"""The part of SARIF 2.1.0 that a gate writes, as sections 3.13 to 3.52 of the standard have it.

Written by hand from the standard: stricter than its own schema in what a gate always says, and it
knows no property that a gate does not write.
"""


def test_what_a_code_scanner_reads_is_as_its_standard_says(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")  # comes with Ray, where Ray is
    judged = gate(card(tmp_path), most={"ssim": 0.5, "label_accuracy": 0.1}, least={"mse": 0.1})
    judged.write(tmp_path / "gate")
    log = json.loads((tmp_path / "gate" / "gate.sarif").read_text())
    jsonschema.Draft202012Validator.check_schema(SARIF)
    check = jsonschema.Draft202012Validator(SARIF)
    assert [error.message for error in check.iter_errors(log)] == []
    (run,) = log["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert len(set(rules)) == len(rules), "3.19.23: the rules are distinct"
    assert len(run["results"]) == 3
    assert {result["ruleId"] for result in run["results"]} <= set(rules)
    for wrong in (
        {**run["results"][0], "level": "fatal"},
        {**run["results"][0], "message": {}},
        {**run["results"][0], "verdict": "fail"},
        {key: value for key, value in run["results"][0].items() if key != "locations"},
    ):
        spoilt = {**log, "runs": [{**run, "results": [wrong]}]}
        assert not check.is_valid(spoilt)


def test_the_command_writes_for_machines_and_ends_by_the_verdict(tmp_path: Path) -> None:
    card(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"private")

    def ended(*words: str) -> int:
        return CliRunner().invoke(commands, ["gate", str(tmp_path), *words]).exit_code

    assert ended("--max", "identification=0.5") == 0
    assert ended("--max", "label_accuracy=0.5") == 3
    assert ended("--max", "ssim=much") == 2
    assert ended("--max", "ssim=0.5", "--max", "identification=0.5", "--decides", "Ada") == 1
    said = json.loads((tmp_path / "gate" / "gate.json").read_text())
    assert (said["verdict"], said["filed"]["decides"]) == (FAIL, "Ada")
    assert set(said["filed"]) == {
        "app",
        "hashes",
        "found",
        "assumed",
        "scope",
        "mitigations",
        "versions",
        "time",
        "decides",
    }
    assert set(said["filed"]["versions"]) == {"leakbed", "source", "python", "flwr", "torch"}
    assert said["filed"]["scope"]["nodes"] == [2]
    sarif = json.loads((tmp_path / "gate" / "gate.sarif").read_text())
    (run,) = sarif["runs"]
    assert sarif["version"] == "2.1.0"
    assert [(each["ruleId"], each["level"]) for each in run["results"]] == [
        ("leakbed/ssim", "error")
    ]
    suite = ET.parse(tmp_path / "gate" / "gate.xml").getroot()  # noqa: S314  ours
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    assert not (tmp_path / "gate" / "pictures").exists()
    assert ended("--max", "ssim=0.9", "--pictures") == 0
    assert (tmp_path / "gate" / "pictures" / "a.png").is_file()
