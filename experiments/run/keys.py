"""What a result depends on beside its settings: the code of its stage, its data, a user's modules.

A cell has three stages, and each has a digest of the code that is reached from it by imports:
training (:mod:`experiments.run.train` and the protocol, defences and adversary of the run), the
answer (that, :mod:`experiments.run.attack` and the attack) and the scores (all that
:mod:`experiments.run.executor` reaches, the oracle among it). So an edit of one attack trains
nothing again, and an edit of a metric or of scoring attacks nothing again. Two parts of the oracle
are read earlier: training reaches the answer key (:mod:`leakbed.oracle.truth`), label attacks their
rivals. A hijacker or a live watcher is scored while it trains, so its training reaches metrics too.
"""

from experiments.results.cards import card_key
from experiments.run.prepare import Prepared
from experiments.settings.cells import CellSettings, Training
from leakbed.provenance import code_digest, own_modules
from leakbed.reach import digest

_TRAINS, _ANSWERS, _SCORES = (f"experiments.run.{each}" for each in ("train", "attack", "executor"))


def training_key(prepared: Prepared) -> str:
    """Return the name of a training run's folder."""
    settings = prepared.settings
    return settings.key(f"{_code((_TRAINS,), settings)}:{prepared.fingerprint}")


def answer_key_of(cell: CellSettings, prepared: Prepared) -> str:
    """Return the name under which a cell's guess is kept.

    Args:
        cell: The cell.
        prepared: Its training run.

    Returns:
        The same for cells that differ only in what is made of the guess.
    """
    settings = {**cell.training.as_json(), "attack": cell.as_json()["attack"]}
    return card_key(settings, _source(cell, prepared, (_TRAINS, _ANSWERS)))


def score_key(cell: CellSettings, prepared: Prepared) -> str:
    """Return the name of a cell's card."""
    return card_key(cell.as_json(), _source(cell, prepared, (_SCORES,), cell.judged_by()))


def score_code(cell: CellSettings) -> str:
    """Return the digest of all code that a cell's result depends on."""
    return _code((_SCORES,), cell.training, *cell.judged_by())


def attack_code(module: str, attack: str) -> str:
    """Return the digest of the code that attacks what was recorded elsewhere.

    Args:
        module: Which does it.
        attack: Catalogue key or import path.

    Returns:
        Of ours and the user's.
    """
    own = own_modules([attack])
    return ":".join(filter(None, (digest((module, *own), frozenset({attack})), code_digest(own))))


def _source(
    cell: CellSettings, prepared: Prepared, modules: tuple[str, ...], names: tuple[str, ...] = ()
) -> str:
    code = _code(modules, cell.training, cell.attack.name, *names)
    own = code_digest(own_modules([cell.attack.name, *names]))
    return ":".join(filter(None, (code, prepared.fingerprint, own)))


def _code(modules: tuple[str, ...], training: Training, *attack: str) -> str:
    """Return the digest of what modules reach, of catalogues the entries that a run uses alone."""
    names = {
        training.protocol.name,
        training.data.name,
        training.data.public_from or "",
        training.model.name,
        *training.plugins(),
        *attack,
    }
    roles = {"adversary": training.adversary, "intruder": training.intruder}
    used = names | {role for role, acts in roles.items() if acts is not None}
    return digest((*modules, *own_modules(names)), frozenset(used))
