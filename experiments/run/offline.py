"""Attack a trace that was recorded elsewhere, with or without its answers.

Guessed images are also drawn into a PNG, one row a target, for a person to look at.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.image
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from experiments.app_audit.truth import made_answers
from experiments.results.cards import Card, Threat, card_key, peak_memory, write_card
from experiments.results.folder import make_folder
from experiments.run.attack import Attacked, attack_run, keep_answer, with_rivals
from experiments.run.guesses import share_on_budget
from experiments.run.judge import Verdict, judge, keep_truth
from experiments.run.keys import attack_code
from experiments.run.targets import Evidences
from experiments.run.training_run import TrainingRun
from experiments.run.view import refuse_uncounted
from experiments.settings.load import load_settings
from experiments.settings.plugins import AttackSettings
from leakbed import __version__
from leakbed.oracle.truth import AnswerKey
from leakbed.seeds import derive
from leakbed.tap.facts import (
    UNKNOWN_DEFENSE,
    UnpermittedModelError,
    amended,
    refuse_import,
    require,
)
from leakbed.tap.trace import Trace
from leakbed.tensors import configure_torch, describe_device, peak_gpu_memory, resolve_device

_SCALE = 4  # screen pixels per image pixel


def write_pictures(
    images: Float[Tensor, " targets rows channels height width"], path: Path
) -> None:
    """Write images as a grid, targets from top to bottom and their rows from left to right.

    Args:
        images: Pixel values in [0, 1]; others are clipped.
        path: Of a PNG file; its folder is made, readable by its owner only.
    """
    targets, rows, channels, height, width = images.shape
    tiles = images.clamp(0, 1).nan_to_num(0).permute(0, 3, 1, 4, 2)
    sheet = tiles.reshape(targets * height, rows * width, channels).permute(2, 0, 1)
    enlarged = interpolate(sheet[None], scale_factor=_SCALE)[0].permute(1, 2, 0)
    pixels = enlarged.expand(-1, -1, 3) if channels == 1 else enlarged[..., :3]
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    matplotlib.image.imsave(path, pixels.contiguous().numpy())
    path.chmod(0o600)


def attack_trace(
    trace: Path,
    name: str,
    *,
    answers: Path | None = None,
    out: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    device: str = "auto",
    model: str | None = None,
    about: Mapping[str, Any] | None = None,
    truth: str | None = None,
) -> Card:
    """Attack a trace; score it if its answers, or the truth they are made of, are given.

    A run's seed is its owner's secret and stands in no trace. It is read from the answers or from
    the run's folder around the trace; with neither, it is not known.

    A trace that was never closed is attacked as far as it goes, and its card says so. One that does
    not say what run it is of is a :class:`~leakbed.tap.trace.TraceError`.

    Args:
        trace: The trace's folder.
        name: The attack's catalogue key.
        answers: The run's answer key; without it the card is marked ``unscored``.
        out: Where the card and the guesses go; beside the trace if None.
        settings: The attack's settings, common and own.
        seed: The adversary's own. By default that of the run, which draws the attack as the run's
            own card did, or 0 where the run's is not known.
        device: As for :func:`leakbed.models.resolve_device`.
        model: The network, in place of the one that the trace says; where that is an import path,
            naming it permits to import it.
        about: What else to take for true of the run: arguments of :func:`leakbed.tap.facts.about`.
        truth: ``package.module:function`` of the data's owner, in place of answers: see
            :mod:`experiments.app_audit.truth`.

    Returns:
        The card.

    Raises:
        UnpermittedModelError: The trace names a network by import path, and ``model`` names none.
        TwoTruthsError: If there are both answers and a truth.
    """
    if answers is not None and truth is not None:
        raise TwoTruthsError("--answers and --truth both say what is true; give one of them")
    chosen = load_settings({"name": "offline", "attack": [{"name": name, **(settings or {})}]})
    trace = trace.resolve()  # of "." there is no name to call the results by
    attack, recorded = chosen.attack[0], Trace(trace, partial=True)
    require(recorded.about)
    facts = {**(about or {}), **({} if model is None else {"model": model})}
    if facts:
        nodes = len({each.fields["node"] for each in recorded.records if "node" in each.fields})
        recorded.about = amended(recorded.about, facts, nodes=nodes or None)
    said = recorded.about
    require(said, "architecture", "protocol", "data", "nodes", "local_steps", "batch_size")
    try:
        refuse_import(said, model)
    except UnpermittedModelError:
        # Told first, since permitting the import would not mend it.
        refuse_uncounted(Evidences.of(recorded, attack.collect).updates)
        raise
    configure_torch()  # the same bits as in a run
    # Another run's answers are refused before hours of attack.
    key_given = None if answers is None else AnswerKey.read(answers, trace=trace)
    folder = make_folder(trace.parent / f"{trace.name}-attacked" if out is None else out)
    if truth is not None:
        key_given, answers = made_answers(truth, recorded, folder / "answers")
    seeds = _Seeds.of(trace, key_given, asked=seed)
    stream = derive(seeds.attack, f"adversary/{attack.name}")
    attacked = attack_run(recorded, attack, stream=stream, device=device, answers=answers)
    where = resolve_device(device)
    asked = {
        "trace": str(trace),
        **({"about": json.loads(json.dumps(facts))} if facts else {}),
        "attack": attack.model_dump(mode="json"),
        "device": where.type,
        "seeds": asdict(seeds),
    }
    key = card_key(asked, attack_code(__name__, attack.name))
    if key_given is not None:
        stream = derive(seeds.oracle, "oracle")
        attacked = with_rivals(attacked, key_given, recorded, stream=stream)
    note = keep_answer(attacked, folder / "guesses" / f"{key}.safetensors")
    attacked = replace(attacked, notes=(*attacked.notes, *([note] if note else [])))
    truths = folder / "truths" / f"{key}.safetensors"
    verdict = _judged(attacked, key_given, recorded, truths, seeds.oracle)
    if attacked.guess.images is not None:
        write_pictures(attacked.guess.images, folder / "pictures" / f"{key}.png")
    card = _card(attack, attacked, said, verdict, key=key, seeds=seeds, device=where)
    write_card(card, folder)
    return card


class TwoTruthsError(ValueError):
    """An attack that is given two answers to what is true."""


@dataclass(frozen=True, kw_only=True)
class _Seeds:
    """What an attack on a recorded run is drawn from, and what the run was, where that is known."""

    run: int | None
    attack: int

    @classmethod
    def of(cls, trace: Path, answers: AnswerKey | None, *, asked: int | None) -> "_Seeds":
        run = None if answers is None else answers.seed
        if run is None and (whole := TrainingRun.read(trace.parent)) is not None:
            run = whole.seed
        return cls(run=run, attack=(run or 0) if asked is None else asked)

    @property
    def oracle(self) -> int:
        """What the oracle draws from, as on the run's own card."""
        return self.attack if self.run is None else self.run


def _judged(
    attacked: Attacked, answers: AnswerKey | None, trace: Trace, truths: Path, seed: int
) -> Verdict | None:
    if answers is None:
        return None
    verdict, truth = judge(attacked, answers, trace, stream=derive(seed, "oracle"))
    keep_truth(truth, truths)
    return verdict


def _card(
    attack: AttackSettings,
    attacked: Attacked,
    about: Mapping[str, Any],
    verdict: Verdict | None,
    *,
    key: str,
    seeds: _Seeds,
    device: torch.device,
) -> Card:
    own = (*attacked.notes, *_compared(attacked))
    scored: dict[str, Any] = {"status": "unscored", "notes": own}
    if verdict is not None:
        scored = {
            "status": "done",
            "scores": verdict.scores,
            "baselines": verdict.baselines,
            "control": verdict.control,
            "unreliable": verdict.unreliable,
            "notes": (*own, *verdict.notes),
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
        defense=about.get("defense", UNKNOWN_DEFENSE),
        seed=seeds.oracle,
        attack_seed=seeds.attack,
        threat=Threat.of(attacked.attack.threat),
        exposure=attacked.exposure,
        tuned_on=attack.model_dump(mode="json")["tuned_on"],
        settings=attack.model_dump(mode="json", exclude={"tuned_on"}),
        device=describe_device(device),
        cost={
            "attack_seconds": attacked.seconds,
            "peak_memory": peak_memory(),
            **peak_gpu_memory(device),
        },
        reported=attack.reported,
        objective=dict(attacked.objective),
        version=__version__,
        source=attack_code(__name__, attack.name),
        stopped_on_budget=share_on_budget(attacked.guess),
        **scored,
    )


def _compared(attacked: Attacked) -> tuple[str, ...]:
    """Say how well the guess explains the messages, which is known without the truth."""
    if not attacked.objective:
        return ()
    values = dict(attacked.objective)
    solved = int(values.pop("solved"))
    beside = ", ".join(
        f"{value:.3g} of {'the guess' if name == 'attack' else name}"
        for name, value in values.items()
    )
    return (
        f"the attack's own objective: {beside}; it counts {solved} of {len(attacked.targets)} "
        "messages as solved",
    )
