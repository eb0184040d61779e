"""Installs Leakbed and its dependencies, or other packages, with the Python that runs it.

`make setup` runs it with `.venv`'s: pip installs uv, and uv installs the rest, in a quarter of
pip's processor time. Where uv cannot be installed or cannot do it, pip does. uv does not read pip's
configuration, so what decides where packages come from is handed on to it; where pip is set up in a
way that uv has no word for, pip installs.
"""

import argparse
import ast
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PIP_ALONE = frozenset(
    {
        "client-cert",
        "keyring-provider",
        "no-binary",
        "no-build-isolation",
        "no-deps",
        "only-binary",
        "pre",
        "prefix",
        "require-hashes",
        "target",
        "user",
    }
)
"""Options of pip's configuration that decide what is installed, and that uv is not told."""

WORDS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}
"""pip's option, the variable by which uv takes it, and what stands between several values."""

NO_NETWORK = (
    "error: no network: neither uv nor pip reached a package index. Connect this machine, or point "
    "pip at a mirror that it can reach (`pip config list` shows what is set), and run this again."
)


def pip_options(listing: str) -> dict[str, list[str]]:
    """Return what pip is set up with, by option.

    Args:
        listing: What ``pip config list`` prints: configuration files and ``PIP_`` variables.

    Returns:
        Each option's values. Variables replace what files say, and those of ``[install]`` what
        ``[global]`` says, as in pip.
    """
    ranked = {"global": 0, "install": 1, ":env:": 2}
    found: dict[str, tuple[int, list[str]]] = {}
    for line in listing.splitlines():
        name, equals, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if not equals or section not in ranked:
            continue
        rank = ranked[section]
        if rank >= found.get(option, (0, []))[0]:
            found[option] = rank, str(ast.literal_eval(value)).split()
    return {option: values for option, (_, values) in found.items()}


def for_uv(options: Mapping[str, Sequence[str]], given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which uv finds the packages that pip would find.

    Args:
        options: From :func:`pip_options`.
        given: The variables that are set; what the user said to uv itself stays.

    Returns:
        Variables to add.
    """
    told = {
        variable: between.join(
            _there(options[option]) if option == "find-links" else options[option]
        )
        for option, (variable, between) in WORDS.items()
        if options.get(option)
    }
    # pip takes the best version of all indexes; uv by itself the best of the first that has any.
    told["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    # uv takes a pre-release where it makes newer versions of others possible; pip never does.
    told["UV_PRERELEASE"] = "disallow"
    return {name: value for name, value in told.items() if value and name not in given}


def _there(places: Sequence[str]) -> list[str]:
    """Return the places that are addresses or exist: pip ignores the others, uv refuses them."""
    return [place for place in places if "://" in place or Path(place).exists()]


def install(wanted: Sequence[str]) -> list[str]:
    """Install packages with uv, or where it cannot, with pip.

    Args:
        wanted: Arguments that pip and uv both take.

    Returns:
        Nothing where it worked, else lines that say why not.
    """
    options = pip_options(_said("-m", "pip", "config", "list")[1])
    said = _by_uv(wanted, options)
    if said is None:
        return []
    down = _is_down(said)
    if not down:
        reason = next(iter(_errors(said)), "it gave no reason")
        sys.stderr.write(f"pip installs, which takes longer than uv ({reason})\n")
    # Where nothing was reached just now, pip need not try for long; a folder may hold it all.
    tries = ["--retries", "0"] if down else []
    failed, said = _said("-m", "pip", "install", "--quiet", *tries, *wanted)
    if not failed:
        return []
    return [NO_NETWORK] if down or _is_down(said) else _errors(said)


def _by_uv(wanted: Sequence[str], options: Mapping[str, Sequence[str]]) -> str | None:
    """Let uv install; return None where it did, else what was said instead."""
    if alone := sorted(PIP_ALONE & options.keys()):
        return f"pip is set up with {', '.join(alone)}, which uv is not told"
    if _said("-m", "uv", "--version")[0]:
        failed, said = _said("-m", "pip", "install", "--quiet", "--retries", "2", "uv")
        if failed:
            return said
    offline = ["--no-index"] if {*options.get("no-index", ())} & {"1", "true", "yes", "on"} else []
    failed, said = _said(
        *("-m", "uv", "pip", "install", "--quiet", "--python", sys.executable, *offline, *wanted),
        told=for_uv(options, os.environ),
    )
    return said if failed else None


def _said(*arguments: str, told: Mapping[str, str] | None = None) -> tuple[bool, str]:
    """Run this Python with arguments; return whether it failed, and what it printed."""
    ran = subprocess.run(  # noqa: S603  this interpreter, with arguments of our own
        [sys.executable, *arguments],
        env={**os.environ, **(told or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return ran.returncode != 0, ran.stdout


def _is_down(said: str) -> bool:
    """Say whether nothing was reached, in the words of uv or pip: neither has an exit code for it.

    A retry of pip's alone may have helped; then something else is wrong.
    """
    return "error sending request" in said or (
        "connection broken by" in said and "from versions: none" in said
    )


def _errors(said: str) -> list[str]:
    """Return what was said but for warnings, of which pip prints one for each place it skips."""
    lines = [line for line in said.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith("WARNING: ")] or lines


def main() -> None:
    """Install packages: unless told which, this repository with all it needs, editable.

    Raises:
        SystemExit: They could not be installed.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--constraint", help="a file of versions to keep to")
    parser.add_argument("packages", nargs="*", help="such as flwr==1.21.0")
    asked = parser.parse_args()
    constraint = ["--constraint", asked.constraint] if asked.constraint else []
    wanted = [*constraint, *(asked.packages or ["--editable", ".[testbed,dev]"])]
    if lines := install(wanted):
        raise SystemExit("\n".join(lines))


if __name__ == "__main__":
    main()
