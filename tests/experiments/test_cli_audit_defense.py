"""A defence is audited by its name at the command line."""

import pytest
from typer.testing import CliRunner

from experiments.cli import app


def audited(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["audit-defense", *words])
    return result.exit_code, result.output


def test_a_claim_that_holds_says_what_was_found() -> None:
    code, text = audited("smashed-noise", "-o", "clip=1.0", "--draws", "20000")
    assert code == 0, text
    assert text.count("the claim holds") == 2
    assert "two messages of equal inputs" in text  # epsilon of both is more than the setting


def test_a_refuted_claim_ends_with_an_error() -> None:
    code, text = audited("local-dp", "-o", "epsilon=48.0", "--draws", "3000")
    assert (code, "REFUTED" in text) in {(0, False), (1, True)}  # the exit code is the verdict
    code, text = audited(
        "label-dp",
        *("-o", "mechanism=rr-with-prior", "-o", "form=published", "-o", "prior=[0.8, 0.1, 0.1]"),
    )
    assert code == 2, text  # the published form claims nothing
    assert "claims no differential privacy" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("smashed-nose",), "did you mean 'smashed-noise'"),
        (("smashed-noise", "-o", "sigmar=1"), "did you mean 'sigma'"),
        (("iso-noise",), "claims no differential privacy"),
        (("tests.experiments.test_cli_audit_defense:audited",), "name a class"),
        (("tests.leakbed.oracle.test_audit:Reuses", "-o", "clip=1.0"), "REFUTED"),
    ],
)
def test_what_cannot_be_audited_is_said(words: tuple[str, ...], said: str) -> None:
    code, text = audited(*words)
    assert code in {1, 2}
    assert said in text
