"""Attack a trace that was recorded elsewhere, with or without its answers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.attacking import Attacked, Verdict, attack_run, judge, keep_guess, keep_truth
from experiments.pictures import write_pictures
from experiments.settings import AttackSettings
from experiments.settings_file import load_settings
from leakbed import __version__
from leakbed.cards import Card, Threat, card_key, peak_memory, source_hash, write_card
from leakbed.oracle.answer_key import AnswerKey
from leakbed.seeds import derive
from leakbed.trace import Trace


def attack_trace(
    trace: Path,
    name: str,
    *,
    answers: Path | None = None,
    out: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Card:
    """Attack a trace; score it if its answers are given.

    Args:
        trace: The trace's folder.
        name: The attack's catalogue key.
        answers: The run's answer key; without it the card is marked ``unscored``.
        out: Where the card and the guesses go; beside the trace if None.
        settings: The attack's settings, common and own.
        seed: The adversary's own.
        device: As for :func:`leakbed.models.resolve_device`.

    Returns:
        The card.
    """
    chosen = load_settings({"name": "offline", "attack": [{"name": name, **(settings or {})}]})
    attack, about = chosen.attack[0], Trace(trace).about
    attacked = attack_run(
        trace, attack, stream=derive(seed, f"adversary/{name}"), device=device, answers=answers
    )
    folder = trace.parent / f"{trace.name}-attacked" if out is None else out
    asked = {"trace": str(trace.resolve()), "attack": attack.model_dump(mode="json"), "seed": seed}
    key = card_key(asked, source_hash())
    keep_guess(attacked, folder / "guesses" / f"{key}.safetensors")
    verdict = _judged(attacked, answers, trace, folder / "truths" / f"{key}.safetensors", seed)
    if attacked.guess.images is not None:
        write_pictures(attacked.guess.images, folder / "pictures" / f"{key}.png")
    card = _card(attack, attacked, about, verdict, key=key, seed=seed)
    write_card(card, folder)
    return card


def _judged(
    attacked: Attacked, answers: Path | None, trace: Path, truths: Path, seed: int
) -> Verdict | None:
    if answers is None:
        return None
    verdict, truth = judge(attacked, AnswerKey.read(answers), trace, stream=derive(seed, "oracle"))
    keep_truth(truth, truths)
    return verdict


def _card(
    attack: AttackSettings,
    attacked: Attacked,
    about: Mapping[str, Any],
    verdict: Verdict | None,
    *,
    key: str,
    seed: int,
) -> Card:
    scored: dict[str, Any] = {"status": "unscored"}
    if verdict is not None:
        scored = {
            "status": "done",
            "scores": verdict.scores,
            "baselines": verdict.baselines,
            "control": verdict.control,
            "unreliable": verdict.unreliable,
        }
    return Card(
        key=key,
        case="offline",
        protocol=about["protocol"],
        data=about["data"],
        model=about["architecture"]["name"],
        cut=about["architecture"]["cut"],
        nodes=about["nodes"],
        attack=attack.name,
        defense=about.get("defense", "unknown"),
        seed=seed,
        threat=Threat.of(attacked.attack.threat),
        settings=attack.model_dump(mode="json"),
        cost={"attack_seconds": attacked.seconds, "peak_memory": peak_memory()},
        reported=attack.reported,
        version=__version__,
        source=source_hash(),
        **scored,
    )
