"""What a malicious client got: its samples, asked for after the run, and what they are worth.

The oracle judges them, since no message of the protocol holds an original of theirs. Beside them
stands what the same intruder makes of a network that never trains: as many turns, the same noise,
and nothing to be learned but what an untrained network says.
"""

from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from clients.malicious import MaliciousClientSession
from experiments.run.attack import Attacked, Verdict, make_attack
from experiments.run.prepare import Prepared
from experiments.run.targets import MisfitError
from experiments.run.training_run import SAMPLES, TrainingRun
from experiments.settings.plugins import AttackSettings
from leakbed.contracts import Guess
from leakbed.contracts.attack import MaliciousClient
from leakbed.grids import DeterministicGrid
from leakbed.oracle import CONTROL_FAILS, Truth, control_verdict, with_skill
from leakbed.oracle.model_scores import NoSuchImagesError, Prototypes, train_judge
from leakbed.oracle.truth import AnswerKey
from leakbed.tensors import finite
from leakbed.wire.messages import SAMPLES as QUERY
from leakbed.wire.records import CONFIG, METRICS, as_arrays, int_field

UNTRAINED = "untrained-victim"
"""The baseline of an intruder whose network never trained."""


def gather(grid: DeterministicGrid, prepared: Prepared, work: Path) -> None:
    """Ask every malicious node for its samples, once the training is over.

    Args:
        grid: Of the run; nothing here is part of the protocol, so no tap sees it.
        prepared: The run.
        work: The run's folder.
    """
    if (chosen := prepared.settings.intruder) is None:
        return
    count = -(-chosen.samples // len(chosen.nodes))
    asked = [
        Message(
            RecordDict({CONFIG: ConfigRecord({"count": count})}),
            dst_node_id=node,
            message_type=QUERY,
        )
        for node, partition in grid.roster.items()
        if partition in chosen.nodes
    ]
    images, turns = [], []
    for reply in grid.send_and_receive(asked, timeout=prepared.settings.protocol.timeout):
        arrays = as_arrays(reply.content.array_records["arrays"])
        images.append(torch.from_numpy(arrays["images"].copy()))
        turns.append(int_field(reply, reply.content.metric_records[METRICS], "turns"))
    kept = {"images": torch.cat(images)[: chosen.samples], "turns": torch.tensor(turns)}
    save_file(kept, work / SAMPLES)
    (work / SAMPLES).chmod(0o600)


def without_intruder(prepared: Prepared) -> Prepared:
    """Return the run in which the malicious nodes do as honest ones do."""
    return replace(prepared, settings=replace(prepared.settings, intruder=None))


def sampled(run: TrainingRun, settings: AttackSettings) -> Attacked:
    """Return a malicious client's samples as its guess.

    Args:
        run: Trained with it.
        settings: The intruder's.

    Returns:
        One target per sample.

    Raises:
        MisfitError: If it never had a turn.
    """
    held = load_file(run.samples)
    if not int(held["turns"].sum()):
        raise MisfitError(
            "no malicious node was ever sampled for a round; set protocol.fraction = 1, or more "
            "rounds"
        )
    images = held["images"].unsqueeze(1)
    failed = torch.tensor([not finite(image) for image in images])
    guess = Guess(images=images, failed=failed)
    return Attacked(attack=make_attack(settings), targets=(), guess=guess, seconds=0.0)


def judge_samples(
    attacked: Attacked, run: TrainingRun, prepared: Prepared
) -> tuple[Verdict, Truth]:
    """Score a malicious client's samples beside what needs no victim.

    Args:
        attacked: Its samples.
        run: In which it got them.
        prepared: That run's ingredients.

    Returns:
        The verdict, and as truth the private image of the class nearest to each sample.

    Raises:
        MisfitError: If there are no images to judge by.
    """
    answers, images = AnswerKey.read(run.answers), attacked.guess.images
    if images is None or not isinstance(attacked.attack, MaliciousClient):
        raise MisfitError("only an intruder's samples can be judged by the class they show")
    try:
        prototypes = _prototypes(answers, attacked.attack.aim, prepared.stream("oracle/judge"))
    except NoSuchImagesError as error:
        raise MisfitError(str(error)) from error
    untrained = prototypes.score(_untrained(prepared, run, count=len(images)))
    found = prototypes.baselines()
    verdict = control_verdict(untrained, {"chance": found["chance"]})
    found[UNTRAINED] = untrained
    scores = with_skill(prototypes.score(images.flatten(0, 1)), found)
    judge = prototypes.judge
    described = {"accuracy": judge.accuracy, "rows": judge.rows, "held_out": judge.held_out}
    turns = load_file(run.samples)["turns"].tolist()
    return (
        Verdict(
            scores={**scores.as_dict(), "judge": described, "turns": turns},
            baselines={name: {**each.means()} for name, each in found.items()},
            control={**verdict, "untrained_victim": untrained.as_dict()},
            unreliable=_doubts(verdict["above"], scores.failures, scores.targets),
        ),
        _nearest(prototypes, images.flatten(0, 1)),
    )


def _doubts(above: list[str], failures: int, targets: int) -> str | None:
    reasons = [CONTROL_FAILS + ", ".join(above)] if above else []
    reasons += [f"{failures} of {targets} targets failed"] if failures else []
    return "; ".join(reasons) or None


def _prototypes(answers: AnswerKey, label: int, stream: int) -> Prototypes:
    """Return the class that samples should show, with a judge trained on all private rows."""
    judge = train_judge(
        answers.images,
        answers.labels,
        test_images=answers.test_images,
        test_labels=answers.test_labels,
        num_classes=answers.num_classes,
        stream=stream,
    )
    held = answers.test_labels == label
    return Prototypes(
        judge=judge,
        label=label,
        num_classes=answers.num_classes,
        real=answers.images[answers.labels == label],
        held_out=answers.test_images[held],
        others=answers.test_images[~held],
    )


def _nearest(prototypes: Prototypes, images: Float[Tensor, " count *image"]) -> Truth:
    """Return the private image of the class nearest to each sample, as a truth to be shown."""
    position = prototypes.nearest(images)
    return Truth(
        images=prototypes.real[position].unsqueeze(1),
        labels=torch.full((len(position), 1), prototypes.label),
        num_classes=prototypes.num_classes,
        candidates=prototypes.real,
        positions=position.unsqueeze(1),
    )


def _untrained(
    prepared: Prepared, run: TrainingRun, *, count: int
) -> Float[Tensor, " count *image"]:
    """Return an intruder's samples after as many turns with the network as it was at first."""
    cells = [prepared.cell(node) for node in _malicious(prepared)]
    had = load_file(run.samples)["turns"].tolist()
    made = []
    for cell, turns in zip(cells, had, strict=True):
        network = prepared.architecture.build(prepared.stream("victim-init"))
        if (intrusion := MaliciousClientSession.of(cell)) is not None:
            rows = prepared.plan.batch_size
            intrusion.train_offline(network.to(cell.torch_device()), turns=turns, rows=rows)
            made.append(intrusion.samples(-(-count // len(cells))).cpu())
    return torch.cat(made)[:count]


def _malicious(prepared: Prepared) -> tuple[int, ...]:
    """Return the malicious nodes in the order in which they answered."""
    chosen = prepared.settings.intruder
    return () if chosen is None else tuple(sorted(chosen.nodes))
