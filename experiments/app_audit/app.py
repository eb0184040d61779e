"""Audit a stranger's Flower app: run a copy of it as it stands, tapped, and attack what it sent.

The app runs in a process of its own (:mod:`experiments.app_audit.app_run`). Its network is looked
for among the modules that it trained, what was seen of its batches says the rest, and what it fed
its network scores the attacks. What was assumed is said in the result and in ``audit.json``.
"""

import hashlib
import importlib
import inspect
import json
import logging
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor, nn

from attacks import ATTACKS
from experiments.app_audit.app_run import FED, SEEN, TRACES, AppError, components
from experiments.app_audit.protections import defense_of, of_gradients, summed
from experiments.app_audit.truth import OwnedTruthError, answers_of
from experiments.results.cards import Card
from experiments.run.offline import attack_trace
from experiments.run.view import architecture_of
from leakbed.contracts import UnfitError
from leakbed.events import Arrays, Failed, UpdateUp
from leakbed.lookup import format_error
from leakbed.models import ModelMismatchError, UnknownModelError, weights_as_run
from leakbed.tap.facts import amended
from leakbed.tap.trace import Trace
from leakbed.tap.trace_summary import summary

_log = logging.getLogger("leakbed")

_BUILT = "leakbed_audited_model"
_SEARCHES = ("dlm", "dlm-plus")
_LEFT_BEHIND = (".git", ".venv", "__pycache__", "*.egg-info")
_GRADIENTS = (
    "; its gradients are not of weights that a node was sent (a vertical app's are of what nodes "
    "computed), and no attack here reads those"
)
_EQUAL = 1e-4  # relative spread of norms that only clipping explains


class ModelNotFoundError(AppError):
    """No network of the app fits the weights that it sent."""


class NoNetworkError(ModelNotFoundError):
    """The app defines no network at all, so nothing that ``--model`` names would be its own."""


@dataclass(kw_only=True)
class Audit:
    """What an audit of an app found.

    Attributes:
        app: The app's folder or bundle.
        trace: Where its messages are recorded.
        assumed: What was taken for true and how it was found, one line each.
        leaks: What can be read off the messages without any search, one line each.
        unfit: Attacks that do not fit, and why.
        cards: Results of those that do.
        hashes: SHA-256 of the app's files and of the trace's index, in which those of all its
            records stand.
    """

    app: str
    trace: Path
    assumed: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)
    cards: list[Card] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it beside the cards, without them.

        Args:
            folder: Gets ``audit.json``.
        """
        keys = [card.key for card in self.cards]
        said = {**asdict(replace(self, cards=[])), "trace": self.trace.name, "cards": keys}
        (folder / "audit.json").write_text(json.dumps(said, indent=1))


def audit_app(
    app: Path,
    out: Path,
    *,
    nodes: int = 2,
    limit: float = 600,
    model: str | None = None,
    about: Mapping[str, Any] | None = None,
    attacks: tuple[str, ...] = (),
    iterations: int = 300,
    node_config: Mapping[str, Any] | None = None,
) -> Audit:
    """Run an app as it stands and attack its messages.

    A network that is not found is a :class:`ModelNotFoundError`, unless the app sent none.

    Args:
        app: Its folder, or a bundle built of it (``.fab``).
        out: The results folder, which holds no audit yet.
        nodes: How many nodes to run it on.
        limit: Seconds that it may take.
        model: Its network as ``package.module:Name``; looked for if None.
        about: Facts of the run in place of what is seen.
        attacks: Keys of the catalogue; all if empty.
        iterations: Of each search for images; its cards say where that was too few.
        node_config: What every node is configured with, beside its partition; in a text
            ``{partition}`` stands for its partition id.

    Returns:
        What was found.

    Raises:
        AppError: The app cannot be run, ended with an error or did not end.
    """
    if (out / "audit.json").exists():
        raise AppError(f"{out} holds an audit already; name another folder with --out")
    bundle = _copied(app, out / "app")
    _, _, config = components(bundle)
    digest = _digest(bundle)
    _run(bundle, out, nodes=nodes, limit=limit, node_config=node_config or {})
    (folder,) = (out / TRACES).iterdir()
    seen = json.loads((out / SEEN).read_text())
    found = Audit(app=app.resolve().name, trace=folder)
    index = hashlib.sha256((folder / "index.jsonl").read_bytes()).hexdigest()
    found.hashes = {"app": digest, "trace": index}
    trace = Trace(folder, partial=True)
    found.assumed.append(f"the app ran on {nodes} nodes in one process, one after another")
    _refuse_failed(trace)
    defense = defense_of(bundle, seen["imported"], found.assumed)
    said: Mapping[str, Any] = {"defense": defense, **(about or {})}
    trace, fed, said = _evidence(trace, seen, load_file(out / FED), said, out, found)
    updates: list[Any] = list(trace.events(UpdateUp))
    refused = unattackable(trace, updates, seen, said=said)
    facts: dict[str, Any] = {}
    if refused is None:
        sys.path.insert(0, str(bundle))
        importlib.invalidate_caches()
        facts = _seen_facts(seen, fed, said, found)
        try:
            facts["model"] = model or network_of(
                [name for name, _ in seen["models"]], updates[0].before, {**config, **facts}, bundle
            )
        except NoNetworkError as error:
            refused = str(error)
    if refused is not None:
        found.unfit["all"] = refused
        found.write(out)
        return found
    found.assumed.append(f"the network is {facts['model']}: it fits the weights sent")
    trace.about = amended(trace.about, facts, nodes=nodes)
    found.leaks += of_the_network(trace, updates)
    answers = _answers(trace, fed, out, found)
    settings = {"iterations": iterations, "restarts": 2}
    for name in attacks or tuple(ATTACKS):
        own = settings if name in _SEARCHES else {}
        _attack(trace.folder, name, facts=facts, answers=answers, out=out, own=own, found=found)
    found.write(out)
    return found


def _attack(
    folder: Path,
    name: str,
    *,
    facts: Mapping[str, Any],
    answers: Path | None,
    out: Path,
    own: Mapping[str, Any],
    found: Audit,
) -> None:
    """Attack a trace; keep the card, or why the attack does not fit."""
    try:
        card = attack_trace(
            folder,
            name,
            answers=answers,
            out=out,
            settings=own,
            model=facts["model"],
            about={key: value for key, value in facts.items() if key != "model"},
            seed=0,
        )
    except UnfitError as error:
        found.unfit[name] = str(error)
    else:
        found.cards.append(card)


def _evidence(  # noqa: PLR0917  what one run showed
    trace: Trace,
    seen: Mapping[str, Any],
    fed: Mapping[str, Tensor],
    said: Mapping[str, Any],
    out: Path,
    found: Audit,
) -> tuple[Trace, Mapping[str, Tensor], Mapping[str, Any]]:
    """Return the updates to attack, what they were made of, and what is to be said of them."""
    updates: list[Any] = list(trace.events(UpdateUp))
    if summary(trace).masked and (whole := summed(trace, seen, fed, out / "summed")):
        found.assumed.append(whole.assumed)
        return whole.trace, whole.fed, {**whole.facts, **said}
    if not updates and (made := of_gradients(trace, seen, out / "gradients")):
        found.assumed.append("gradients that nodes sent are attacked as updates by steps of size 1")
        return made, fed, said
    found.leaks += unsearched(updates)
    return trace, fed, said


def _copied(app: Path, to: Path) -> Path:
    """Return a copy of an app's folder, or of what lies in its bundle."""
    if app.is_dir():
        shutil.copytree(app, to, ignore=shutil.ignore_patterns(*_LEFT_BEHIND))
        return to
    if not app.is_file() or not zipfile.is_zipfile(app):
        raise AppError(f"{app} is no folder and no bundle; name a Flower app's folder or its .fab")
    with zipfile.ZipFile(app) as bundle:
        bundle.extractall(to)  # zipfile leaves out what would lie outside
    return to


def _digest(bundle: Path) -> str:
    """Return a hash of all files of a bundle, their paths and contents."""
    digest = hashlib.sha256()
    for file in sorted(each for each in bundle.rglob("*") if each.is_file()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(bundle).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _run(
    bundle: Path, out: Path, *, nodes: int, limit: float, node_config: Mapping[str, Any]
) -> None:
    """Run the app in a process of its own, and say in its own words why it did not end well."""
    module, told = "experiments.app_audit.app_run", json.dumps(dict(node_config))
    command = [sys.executable, "-m", module, bundle, out, nodes, told]
    root = Path(__file__).resolve().parents[2]
    with (out / "app.log").open("w") as log:
        try:
            ended = subprocess.run(  # noqa: S603  the user asks to run the app
                [str(word) for word in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=limit,
                cwd=root,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise AppError(
                f"the app did not end within {limit:g} s; give it longer with --limit, or fewer "
                f"rounds in its own config (its log: {out / 'app.log'})"
            ) from None
    if ended.returncode:
        last = (out / "app.log").read_text().rstrip().rsplit("\n", 1)[-1]
        reason = last.removeprefix("AppError: ")
        raise AppError(f"{reason} (the app's log: {out / 'app.log'})")


def _refuse_failed(trace: Trace) -> None:
    """Refuse a run in which every node failed; its first reason is the app's own."""
    failed: list[Any] = list(trace.events(Failed))
    if failed and not any(trace.events(UpdateUp)):
        raise AppError(f"no node of the app trained; the first said: {failed[0].reason}")


def unattackable(
    trace: Trace, updates: list[Any], seen: Mapping[str, Any], *, said: Mapping[str, Any]
) -> str | None:
    """Return why no attack fits an app, whatever its network is.

    Args:
        trace: Of its messages.
        updates: Its weight updates.
        seen: What its run showed of its networks and losses.
        said: Facts that the user gave.

    Returns:
        The reason in words of the app; None where attacks may fit.
    """
    if summary(trace).masked:
        return (
            "the app aggregates securely (SecAgg+): what a single node sent is masked, and no "
            "message told the server's model after a round whose batches were seen, so that there "
            "is no sum to attack; let the app train a further round, or evaluate after it"
        )
    if not updates:
        kinds = Counter(record.fields.get("message_type", record.kind) for record in trace.records)
        sent = ", ".join(f"{kind} ({number})" for kind, number in sorted(kinds.items()))
        others = "" if "gradients" not in kinds else _GRADIENTS
        return (
            "the app sent no updates of weights, which this audit attacks; its records are "
            f"{sent or 'none'}{others}"
        )
    if seen["models"] and not seen["batches"] and not {"num_classes", "batch_size"} <= set(said):
        return (
            f"the app trained {seen['models'][0][0]}, but no cross entropy over class labels was "
            "seen: attacks on weight updates are of classifiers; if it is one, say --about "
            "image_shape=..., --about num_classes=... and --about batch_size=..."
        )
    return None


def _seen_facts(
    seen: Mapping[str, Any], fed: Mapping[str, Tensor], said: Mapping[str, Any], found: Audit
) -> dict[str, Any]:
    """Return what is said of the run and what it showed of itself, each of these with a line."""
    facts: dict[str, Any] = {"partitions": seen["partitions"], "data": "the app's own"}
    told: dict[str, str] = {}
    batches = list(seen["batches"].values())
    if batches:
        steps = {len(each) for each in batches}
        facts["batch_size"] = max(map(max, batches))
        facts["local_steps"] = steps.pop() if len(steps) == 1 else None
        told["batch_size"] = f"batches of {facts['batch_size']}, as the nodes' losses were given"
    shapes = {tuple(v.shape[1:]) for k, v in fed.items() if k.endswith("images")}
    if len(shapes) == 1 and len(shape := shapes.pop()) == 3:  # noqa: PLR2004  channels, high, wide
        facts["image_shape"] = shape
        told["image_shape"] = f"inputs of shape {shape}, as the network was fed them"
    if len(seen["classes"]) == 1:
        facts["num_classes"] = seen["classes"][0]
    made = {json.dumps(each) for each in seen["normalised"]}
    if len(made) == 1:
        facts["mean"], facts["std"] = json.loads(made.pop())
        told["mean"] = f"inputs normalised by mean {facts['mean']} and std {facts['std']}"
    found.assumed += [line for key, line in told.items() if key not in said]
    return facts | dict(said)


def network_of(trained: list[str], sent: Arrays, config: Mapping[str, Any], bundle: Path) -> str:
    """Return the import path of a network of the app that fits the weights it sent.

    Args:
        trained: Classes that the app was seen to train, most often first.
        sent: Weights.
        config: The run config and other facts: arguments that a class may want.
        bundle: The app's folder, which is on the path.

    Returns:
        ``package.module:Name``.

    Raises:
        NoNetworkError: The app defines none.
        ModelNotFoundError: None fits; names the nearest three, and why they do not.
    """
    others = [name for name in _networks(bundle) if name not in trained]
    misfits: list[tuple[int, str]] = []
    for name in [*trained, *others]:
        module_name, _, class_name = name.partition(":")
        kind = getattr(importlib.import_module(module_name), class_name, None)
        arguments = None if kind is None else _arguments(kind, config)
        if kind is None or arguments is None:
            misfits.append((10**6, f"{name} wants arguments that the run config does not have"))
            continue
        try:
            network = kind(**arguments)
        except Exception as error:  # noqa: BLE001  of a stranger's class
            misfits.append((10**6, f"{name} raised {type(error).__name__}: {error}"))
            continue
        wrong = _difference(network, sent)
        if wrong is None:
            return name if not arguments else _registered(name, kind, arguments)
        misfits.append((wrong[0], f"{name}: {wrong[1]}"))
    if not misfits:
        raise NoNetworkError(
            "the app defines no nn.Module: its weights are another kind of model's, and the "
            "attacks on updates here need a network to compute gradients of"
        )
    near = "; ".join(line for _, line in sorted(misfits)[:3])
    raise ModelNotFoundError(
        f"no network of the app fits the weights it sent ({near}); name it with "
        "--model package.module:Name, a class or a function that needs no argument"
    )


def _networks(bundle: Path) -> list[str]:
    """Return every class of networks that the app's modules define, and functions that make one."""
    found = []
    for file in sorted(bundle.rglob("*.py")):
        name = ".".join(file.relative_to(bundle).with_suffix("").parts).removesuffix(".__init__")
        module: ModuleType | None = sys.modules.get(name)
        if module is None:
            try:
                module = importlib.import_module(name)
            except Exception as error:  # noqa: BLE001  a script of the app's, not part of it
                _log.info("%s of the app was not searched: %s", name, format_error(error))
                continue
        for key, each in vars(module).items():
            own = getattr(each, "__module__", None) == name
            if own and inspect.isclass(each) and issubclass(each, nn.Module):
                found.append(f"{name}:{key}")
    return found


def _arguments(kind: Any, config: Mapping[str, Any]) -> dict[str, Any] | None:  # noqa: ANN401
    """Return the arguments a class needs, from the run config; None where one is missing."""
    known = {key.replace("-", "_"): value for key, value in config.items()}
    needed = [
        name
        for name, each in inspect.signature(kind).parameters.items()
        if each.default is each.empty
        and each.kind is not each.VAR_KEYWORD
        and each.kind is not each.VAR_POSITIONAL
    ]
    return {name: known[name] for name in needed} if set(needed) <= set(known) else None


def _registered(name: str, kind: Any, arguments: Mapping[str, Any]) -> str:  # noqa: ANN401
    """Return an import path of a network that is built with arguments."""
    holder = sys.modules.setdefault(_BUILT, ModuleType(_BUILT))
    called = name.rpartition(":")[2]

    def build() -> nn.Module:
        network: nn.Module = kind(**arguments)
        return network

    setattr(holder, called, build)
    return f"{_BUILT}:{called}"


def _difference(network: nn.Module, sent: Arrays) -> tuple[int, str] | None:
    """Return how many arrays differ and how the first does; None where all fit."""
    own = {name: tuple(each.shape) for name, each in network.state_dict().items()}
    given = {name: tuple(each.shape) for name, each in sent.items()}
    if set(given) == set(map(str, range(len(own)))):  # older clients number their arrays
        given = dict(zip(own, given.values(), strict=True))
    wrong = [name for name in {**own, **given} if own.get(name) != given.get(name)]
    if not wrong:
        return None
    key = wrong[0]
    return len(wrong), f"{key!r} has shape {own.get(key)}, and {given.get(key)} was sent"


def _answers(trace: Trace, tensors: Mapping[str, Tensor], out: Path, found: Audit) -> Path | None:
    """Write the answer key from what nodes were fed; None, with a reason, where it cannot be."""
    fed = {}
    for event in trace.events(UpdateUp):
        place, examples = (event.node, event.round), event.examples  # type: ignore[attr-defined]
        images = tensors.get(f"{place[0]}/{place[1]}/images")
        if images is None or examples is None or len(images) < examples:
            found.assumed.append(f"nothing is scored: what node {place[0]} fed was not seen whole")
            return None
        labels = tensors[f"{place[0]}/{place[1]}/labels"]
        fed[place] = images[:examples], labels[:examples]
    try:
        key = answers_of(fed, architecture_of(trace.about))
    except OwnedTruthError as error:
        found.assumed.append(f"nothing is scored: {error}")
        return None
    key.write(out / "answers", trace=trace.folder)
    found.assumed.append("scores are by what each node's network was fed in the first pass")
    return out / "answers"


def unsearched(updates: list[Any]) -> list[str]:
    """Say what can be read off an app's messages without any search, and what protects them.

    Args:
        updates: The weight updates of an app.

    Returns:
        One line each.
    """
    found = []
    if any(event.train_loss is not None for event in updates):
        found.append("every node's training loss travels in the clear")
    if any(event.examples is not None for event in updates):
        found.append("every node's number of samples travels in the clear")
    norms = [
        float(np.sqrt(sum(float(np.square(e.after[k] - e.before[k]).sum()) for k in e.before)))
        for e in updates
        if set(e.before) == set(e.after) and all(v.dtype.kind == "f" for v in e.before.values())
    ]
    if len(norms) > 1 and max(norms) - min(norms) <= _EQUAL * max(norms):
        found.append(f"updates all have norm {max(norms):.3g}: they are clipped")
    elif norms:
        found.append("updates have norms of their own: no clipping seen")
    still = [np.mean(e.after[k] == e.before[k]) for e in updates for k in e.before if k in e.after]
    if still and max(still) > 0:
        found.append("some weights came back unchanged to the last bit: no noise seen on all")
    if any(b"sum_hessian" in tree.tobytes() for e in updates for tree in e.after.values()):
        found.append("trees travel as raw JSON with their sum_hessian, the rows behind a leaf")
    return found


def of_the_network(trace: Trace, updates: list[Any]) -> list[str]:
    """Say what follows from an app's network alone.

    Args:
        trace: That says which it is.
        updates: Its weight updates.

    Returns:
        One line each.

    Raises:
        ModelNotFoundError: The network cannot be built.
    """
    architecture = architecture_of(trace.about)
    try:
        network = architecture.build(0)
    except (ModelMismatchError, UnknownModelError) as error:
        raise ModelNotFoundError(str(error)) from error
    found = []
    first = weights_as_run(network, architecture.image_shape)[0].rpartition(".")[0]
    dense = network.get_submodule(first)
    one_row = {event.examples for event in updates} == {1}
    if isinstance(dense, nn.Linear) and dense.bias is not None and one_row:
        found.append(f"layer {first!r} is dense, first and has a bias: a lone row is exact")
    strange = set(updates[0].after) - set(network.state_dict())
    if strange and not all(name.isdecimal() for name in strange):
        found.append(f"arrays that no key of the network explains: {', '.join(sorted(strange))}")
    return found
