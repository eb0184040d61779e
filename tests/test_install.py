"""Setting up: uv gets what pip is set up with, pip stands in for it, and no network is one line."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
UV = ["-m", "uv", "pip", "install"]
PIP = ["-m", "pip", "install"]
RETRY = "WARNING: Retrying after connection broken by 'NewConnectionError(x)': /simple/uv"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install = _load()

Answers = Callable[[list[str]], tuple[bool, str]]


def played(monkeypatch: pytest.MonkeyPatch, answers: Answers, listing: str = "") -> list[list[str]]:
    """Let `answers` stand for the programs; return what was called, but for the look at pip."""
    called: list[list[str]] = []

    def said(*arguments: str, told: Mapping[str, str] | None = None) -> tuple[bool, str]:
        if arguments[2:] == ("config", "list"):
            return False, listing
        called.append(list(arguments))
        return answers(list(arguments))

    monkeypatch.setattr(install, "_said", said)
    return called


def test_uv_installs_and_is_itself_installed_by_pip_only_where_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = played(monkeypatch, lambda call: (call[-1] == "--version", ""))
    assert install.install(["--constraint", "c.txt", "x"]) == []
    assert [call[:4] for call in called] == [
        ["-m", "uv", "--version"],
        [*PIP, "--quiet"],
        UV,
    ]
    assert called[1][-1] == "uv"
    assert called[2][-3:] == ["--constraint", "c.txt", "x"]

    called = played(monkeypatch, lambda call: (False, ""))
    assert install.install(["x"]) == []
    assert [call[:4] for call in called] == [["-m", "uv", "--version"], UV]


@pytest.mark.parametrize(
    "broken",
    [
        ("-m pip install --quiet --retries 2 uv", "ERROR: No matching distribution found for uv"),
        ("-m uv pip install", "error: the index asks for a login"),
    ],
)
def test_pip_stands_in_where_uv_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: tuple[str, str]
) -> None:
    what, why = broken

    def answers(call: list[str]) -> tuple[bool, str]:
        line = " ".join(call)
        return line.startswith(what) or call[-1] == "--version", why

    called = played(monkeypatch, answers)
    assert install.install(["x"]) == []
    assert called[-1] == [*PIP, "--quiet", "x"]
    assert why in capsys.readouterr().err


def test_pip_installs_where_it_is_set_up_as_uv_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = played(monkeypatch, lambda call: (False, ""), "global.no-binary=':all:'")
    assert install.install(["x"]) == []
    assert called == [[*PIP, "--quiet", "x"]]
    assert "no-binary, which uv is not told" in capsys.readouterr().err


def test_another_failure_of_pip_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip says of places that it skips, and of a connection that came back, is no reason."""
    said = f"{RETRY}\nERROR: no space\n"
    played(monkeypatch, lambda call: (True, said))
    assert install.install(["x"]) == ["ERROR: no space"]


@pytest.mark.parametrize(
    ("said", "by"),
    [
        (f"{RETRY}\nERROR: Could not find uv (from versions: none)", "pip"),
        ("error: Failed to fetch: x\n  cause: error sending request for url (x)", "uv"),
    ],
)
def test_a_folder_of_packages_is_enough_where_there_is_no_network(
    monkeypatch: pytest.MonkeyPatch, said: str, by: str
) -> None:
    def answers(call: list[str]) -> tuple[bool, str]:
        return (by == "pip" and call[-1] == "--version") or call[-1] == "uv" or call[:4] == UV, said

    called = played(monkeypatch, answers)
    assert install.install(["x"]) == []
    assert called[-1] == [*PIP, "--quiet", "--retries", "0", "x"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], ["--editable", ".[testbed,dev]"]),
        (["flwr==1.21.0", "numpy"], ["flwr==1.21.0", "numpy"]),
    ],
)
def test_named_packages_are_installed_in_place_of_the_repository(
    monkeypatch: pytest.MonkeyPatch, given: list[str], wanted: list[str]
) -> None:
    called = played(monkeypatch, lambda call: (False, ""))
    monkeypatch.setattr(sys, "argv", ["install.py", "--constraint", "c.txt", *given])
    install.main()
    assert called[-1][-2 - len(wanted) :] == ["--constraint", "c.txt", *wanted]


def test_variables_come_before_files_and_sections_of_install_before_global() -> None:
    listed = {
        ":env:.find-links": "/a /b",
        "global.find-links": "/c",
        "global.extra-index-url": "\nfile:///one\nfile:///two",
        "global.timeout": "3",
        "install.timeout": "5",
        "download.timeout": "7",
    }
    lines = [f"{option}={value!r}" for option, value in listed.items()]
    listing = "\n".join([*lines, "WARNING: something else"])
    assert install.pip_options(listing) == {
        "find-links": ["/a", "/b"],
        "extra-index-url": ["file:///one", "file:///two"],
        "timeout": ["5"],
    }


def test_uv_is_told_what_pip_is_set_up_with(tmp_path: Path) -> None:
    """As pip itself lists it, from a file and from the environment."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    settings = {
        "index-url": "file:///main",
        "extra-index-url": "file:///one file:///two",
        "find-links": f"{wheels} {tmp_path / 'gone'}",
        "trusted-host": "mirror",
        "cert": "/certificates",
    }
    file = tmp_path / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{key}: {to}\n" for key, to in settings.items()))
    kept = {key: to for key, to in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        env={**kept, "PIP_CONFIG_FILE": str(file), "PIP_TRUSTED_HOST": "other"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    options = install.pip_options(listed)
    told = install.for_uv(options, {"SSL_CERT_FILE": "/already"})
    assert (
        told.items()
        >= {
            "UV_DEFAULT_INDEX": "file:///main",
            "UV_INDEX": "file:///one file:///two",
            "UV_FIND_LINKS": str(wheels),
            "UV_INSECURE_HOST": "other",
            "UV_INDEX_STRATEGY": "unsafe-best-match",
            "UV_PRERELEASE": "disallow",
        }.items()
    )
    assert "SSL_CERT_FILE" not in told


def environment(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)  # noqa: S603
    return folder / "bin" / "python"


@pytest.mark.runtime
def test_no_network_is_one_line(tmp_path: Path) -> None:
    """Nothing listens on port 9; an environment with pip and without uv, as a new one is."""
    python = environment(tmp_path / "environment")
    kept = {key: to for key, to in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    for name in ("install.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    ran = subprocess.run(  # noqa: S603
        [str(python), "install.py"],
        cwd=tmp_path,
        env={**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "https://127.0.0.1:9/simple"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: no network: neither uv nor pip reached a package index")
    assert ran.stdout == ""


def dry(*arguments: str, within: Path = ROOT) -> str:
    """Return what `make` would do."""
    make = shutil.which("make")
    assert make is not None
    command: Sequence[str] = [make, "--dry-run", "--always-make", *arguments]
    return subprocess.run(  # noqa: S603
        command, cwd=within, capture_output=True, text=True, check=True
    ).stdout


def test_make_hands_constraints_on() -> None:
    wanted = "install.py --constraint constraints.txt"
    assert wanted in dry("setup", "CONSTRAINTS=constraints.txt")
    assert "--constraint" not in dry("setup")


def test_an_environment_of_an_older_makefile_is_updated_where_it_is(tmp_path: Path) -> None:
    """It has its interpreter and its stamp, and pyproject.toml is newer."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    bin_ = tmp_path / ".venv" / "bin"
    bin_.mkdir(parents=True)
    (bin_ / "python").touch()
    (tmp_path / ".venv" / ".stamp").touch()
    os.utime(tmp_path / ".venv" / ".stamp", (1, 1))
    make = shutil.which("make")
    assert make is not None
    told = subprocess.run(  # noqa: S603
        [make, "--dry-run", "setup"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert ".venv/bin/python install.py" in told
    assert "-m venv" not in told
