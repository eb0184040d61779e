"""The report is one private file that says what was run, what leaked and what did not."""

import json
import re
import stat
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from torch import Tensor

from experiments.report.page import write_report
from experiments.results.cards import Bound, Card, CardError
from experiments.results.folder import ReportError

MakeCard = Callable[..., Card]
Leave = Callable[..., Path]


class Outline(HTMLParser):
    """Headings, text, and everything a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in {"src", "href", "srcset"}]

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in {"h1", "h2"}:
            self.headings.append(data)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass


def outline(page: Path) -> Outline:
    found = Outline()
    found.feed(page.read_text())
    return found


def test_a_full_report_has_its_sections_in_order(make_card: MakeCard, leave: Leave) -> None:
    folder = leave(make_card())
    leave(make_card(protocol="fedavg", attack="dlm", status="unfit", why="they do not fit"))
    leave(make_card(defense="nopeek", status="diverged", why="node 0 left"))
    page = write_report(folder)
    assert page == folder / "report.html"
    assert [" ".join(heading.split()) for heading in outline(page).headings] == [
        "my-results: what leaked",
        "Originals beside reconstructions",
        "Leakage against utility",
        "All scores",
        "Threat models",
        "What has no scores",
        "How to read the scores",
    ]
    text = page.read_text()
    assert "they do not fit" in text
    assert "<dd>Training diverged: node 0 left</dd>" in text
    assert "The server follows the protocol, reads the activations" in text
    assert "For the owner of the private data." in text
    assert re.search(r"1 result, 1 diverged, 1 unfit, \d{4}-\d\d-\d\d \d\d:\d\d UTC", text)


def at_equal_accuracy(make_card: MakeCard) -> list[Card]:
    bound = Bound(ceiling=0.9, error=0.01, guesses=1, candidates=400, chance=0.01, told="a lot")
    attack = {"settings": {"attack": {"collect": "last"}}, "ceiling": bound}
    low = bound.model_copy(update={"ceiling": 0.2})
    weights = attack | {"protocol": "fedavg", "cut": None, "ceiling": low}
    return [make_card(**attack), make_card(**weights, attack="dlm")]


def test_the_report_opens_with_three_sentences_and_the_figure_and_folds_the_rest(
    make_card: MakeCard, leave: Leave
) -> None:
    for card in at_equal_accuracy(make_card):
        folder = leave(card)
    text = write_report(folder).read_text()
    places = [
        text.index(each)
        for each in (
            "At the same accuracy (95% split, 95% by weight exchange) split learning gives away",
            "Both are told to the server",
            "The best possible guess is told a lot",
            'aria-label="To the server, which follows the protocol; last round',
            "For the owner of the private data.",
            "Originals beside reconstructions",
            "What the numbers say, one by one",
            "All scores",
        )
    ]
    assert places == sorted(places)
    opened = text[: text.index("<details")]
    assert opened.count("<svg") == 1
    assert "<table" not in opened
    assert text.count("<h2>") == text.count("<summary><h2>") + 1  # the pictures are not folded


def test_results_that_cannot_be_trusted_are_counted_on_the_first_screen(
    make_card: MakeCard, leave: Leave
) -> None:
    leave(make_card(unreliable="its control fails"))
    folder = leave(make_card(cut=2))
    text = write_report(folder).read_text()
    assert "1 of 2 results has a reason not to be trusted" in text[: text.index("<details")]
    assert 'id="scores"' in text


def test_the_file_loads_nothing_and_runs_nothing(make_card: MakeCard, leave: Leave) -> None:
    found = outline(write_report(leave(make_card())))
    assert found.loads
    # The scatter's own marks are fragments of the page itself.
    assert all(each.startswith(("data:image/png;base64,", "#")) for each in found.loads)
    assert not found.tags & {"script", "link", "iframe", "object"}


def test_the_file_is_its_owners_alone_and_replaced_whole(
    make_card: MakeCard, leave: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = leave(make_card())
    page = write_report(folder)
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    before = page.read_bytes()

    def full_disk(self: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report(folder)
    assert page.read_bytes() == before
    assert [file for file in folder.iterdir() if "partial" in file.name] == []


def test_names_from_cards_are_text_and_not_markup(make_card: MakeCard, leave: Leave) -> None:
    hostile = "<script>alert(1)</script>"
    folder = leave(make_card(case=hostile, attack=hostile, unreliable=hostile, model=hostile))
    found = outline(write_report(folder))
    assert "script" not in found.tags


def test_a_demo_says_so(make_card: MakeCard, leave: Leave) -> None:
    assert "<strong>Demo.</strong>" in write_report(leave(make_card(demo=True))).read_text()


def test_a_real_run_is_no_demo(make_card: MakeCard, leave: Leave) -> None:
    assert "<strong>Demo.</strong>" not in write_report(leave(make_card())).read_text()


def test_code_that_changed_between_cards_is_said(make_card: MakeCard, leave: Leave) -> None:
    leave(make_card(source="a" * 16))
    folder = leave(make_card(cut=2, source="b" * 16))  # another cell reaches other code
    assert "versions of the code" not in write_report(folder).read_text()
    leave(make_card(seed=1, source="c" * 16))
    page = write_report(folder).read_text()
    assert "seeds were computed by several versions of the code: 1." in page


def test_a_folder_that_mixes_devices_says_so(make_card: MakeCard, leave: Leave) -> None:
    leave(make_card(seed=1, device={"type": "cpu", "name": "x86_64 AVX2"}))
    folder = leave(make_card(seed=2, device={"type": "cuda", "name": "H200", "driver": "1.2"}))
    text = write_report(folder).read_text()
    assert "computed on 2 kinds of device (H200, x86_64 AVX2)" in text


def test_a_cell_that_ran_again_is_shown_once(make_card: MakeCard, leave: Leave) -> None:
    leave(make_card(source="a" * 16))
    folder = leave(make_card(source="b" * 16))
    text = write_report(folder).read_text()
    assert "1 older cards of cells that were run again are left out." in text
    assert "1 result, " in text


def test_the_sentences_get_cards_and_samples(
    make_card: MakeCard, leave: Leave, private: Tensor
) -> None:
    cards = [make_card(), make_card(protocol="fedavg", attack="dlm")]
    leave(cards[0])
    folder = leave(cards[1], truth=private * 0.9)

    def own(cards: list[Card], *, samples: dict[str, str]) -> list[str]:
        return [f"{len(cards)} cards, {len(set(samples.values()))} sets of samples"]

    assert "2 cards, 2 sets of samples" in write_report(folder, conclusions=own).read_text()
    assert "attacked different private samples" in write_report(folder).read_text()


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=f"no results in {tmp_path}.*leakbed run"):
        write_report(tmp_path)


def test_a_broken_card_is_named(make_card: MakeCard, leave: Leave) -> None:
    card = make_card()
    folder = leave(card)
    (folder / "cards" / f"{card.key}.json").write_text("{")
    with pytest.raises(CardError, match=rf"{card.key}\.json is not a card"):
        write_report(folder)


def test_missing_guesses_are_said_on_the_page(make_card: MakeCard, leave: Leave) -> None:
    card = make_card()
    folder = leave(card)
    (folder / "guesses" / f"{card.key}.safetensors").unlink()
    assert f"guesses/{card.key}.safetensors is missing" in write_report(folder).read_text()


def test_the_last_run_is_reported_under_its_name(make_card: MakeCard, leave: Leave) -> None:
    earlier = [make_card(settings={"attack": {"steps": steps}}) for steps in (1, 2)]
    last = make_card(settings={"attack": {"steps": 3}})
    for card in (*earlier, last):
        folder = leave(card)
    assert "3 results, " in write_report(folder).read_text()
    note = {"name": "flagship", "keys": [last.key, "0" * 16]}
    (folder / "last-run.json").write_text(json.dumps(note))
    page = write_report(folder)
    assert outline(page).headings[0].startswith("flagship: what leaked")
    assert "1 result, " in page.read_text()
    assert "2 cards of other runs in this folder are left out." in page.read_text()


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ("{", "does not tell the last run"),
        ('{"name": "x"}', "does not tell the last run"),
        ("[]", "does not tell the last run"),
        ('{"name": "x", "keys": ["a"]}', "none of the last run's 1 results .* the 1 cards"),
    ],
)
def test_a_last_run_that_cannot_be_told_is_refused(
    make_card: MakeCard, leave: Leave, note: str, message: str
) -> None:
    folder = leave(make_card())
    (folder / "last-run.json").write_text(note)
    with pytest.raises(ReportError, match=message):
        write_report(folder)
