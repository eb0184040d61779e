"""What is compared: rows of the right message, narrow enough, of which a few are labelled."""

import pytest
import torch
from torch.nn.functional import normalize

from attacks.building_blocks.similarity import REDUCTIONS, SimilaritySettings, reduced
from leakbed.contracts import Evidence, MissingKnowledgeError, Seat, UnfitViewError
from tests.support.labelled_views import CLASSES, known, planted, view_of

NAME = "similarity-distance"


def test_of_cut_gradients_directions_are_compared_and_of_smashed_data_places() -> None:
    rows, labels = planted(20)
    view = view_of(rows, known(labels), smashed=rows * 3)
    directions = SimilaritySettings().read(view, seed=0, name=NAME).rows
    assert torch.allclose(directions, normalize(rows, dim=1))
    smashed = SimilaritySettings(evidence="smashed")
    assert torch.equal(smashed.read(view, seed=0, name=NAME).rows, rows * 3)
    unified = SimilaritySettings(evidence="smashed", unified=True)
    assert torch.allclose(unified.read(view, seed=0, name=NAME).rows, directions)
    assert smashed.reads() == {Evidence.SMASHED}
    assert SimilaritySettings(seat="server").party() == Seat.SERVER


@pytest.mark.parametrize("by", [each for each in REDUCTIONS if each != "none"])
def test_narrow_rows_keep_their_angles(by: str) -> None:
    rows, labels = planted(300, width=600)
    narrow = reduced(rows, by=by, width=128, stream=3)
    assert narrow.shape == (300, 128)
    if by == "pca":  # it moves the origin, so angles to it change; distances stay
        wide, kept = torch.cdist(rows[:9], rows), torch.cdist(narrow[:9], narrow)
        assert torch.allclose(wide, kept, atol=0.03 * float(wide.max()))
        return
    directions = normalize(torch.stack([rows[labels == label][0] for label in range(CLASSES)]))
    wide = directions @ normalize(rows, dim=1).T
    own = torch.stack([narrow[labels == label][0] for label in range(CLASSES)])
    kept = normalize(own, dim=1) @ normalize(narrow, dim=1).T
    assert (wide - kept).abs().max() < 0.35, "four standard errors of 128 random directions"
    assert (wide - kept).abs().mean() < 0.08


def test_chunks_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = planted(50, width=40)
    for by in ("random-projection", "svd", "pca"):
        whole = reduced(rows, by=by, width=8, stream=3)
        with monkeypatch.context() as patched:
            patched.setattr("attacks.building_blocks.similarity._CHUNK", 7)
            apart = reduced(rows, by=by, width=8, stream=3)
        assert whole.shape == apart.shape == (50, 8)
        if by != "pca":  # its fit forgets a little from part to part
            assert torch.allclose(whole, apart, atol=1e-5 * float(rows.abs().max()))


def test_an_svd_knows_the_first_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attacks.building_blocks.similarity._FITTED", 20)
    rows, _ = planted(60, width=40)
    other = torch.cat([rows[:20], torch.randn(40, 40, generator=torch.Generator().manual_seed(1))])
    first = reduced(rows, by="svd", width=8, stream=3)
    assert torch.equal(first[:20], reduced(other, by="svd", width=8, stream=3)[:20])


def test_rows_that_are_no_numbers_are_left_out() -> None:
    rows, labels = planted(12)
    rows[7, 3] = torch.nan
    found = SimilaritySettings().read(view_of(rows, known(labels)), seed=0, name=NAME)
    assert len(found.rows) == 11
    assert found.usable.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    spread = found.spread(torch.arange(11), missing=-1.0)
    assert spread.tolist() == [0, 1, 2, 3, 4, 5, 6, -1, 7, 8, 9, 10]
    assert found.known.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(found.labels, labels[:CLASSES])


def test_classes_without_a_known_label_are_named() -> None:
    rows, labels = planted(20)
    view = view_of(rows, known(labels, first=3))
    with pytest.raises(MissingKnowledgeError, match=r"no label of class 3, 4, .* partial = true"):
        SimilaritySettings().read(view, seed=0, name=NAME)
    found = SimilaritySettings(partial=True).read(view, seed=0, name=NAME)
    assert found.labels.tolist() == [0, 1, 2]


def test_what_does_not_fit_is_refused() -> None:
    rows, labels = planted(20)
    some = known(labels)
    for view, error, told in (
        (view_of(rows, None), MissingKnowledgeError, "known_per_class = 0 knows none"),
        (view_of(rows, some, cut_gradient=None), MissingKnowledgeError, "the view has none"),
        (view_of(rows, some, rows=4), UnfitViewError, "4 samples stand behind each message"),
        (view_of(rows, some, labels=labels[:, None]), UnfitViewError, "gives the client every"),
        (view_of(rows, some, num_classes=3), UnfitViewError, "a known label is 4, but there are 3"),
    ):
        with pytest.raises(error, match=told):
            SimilaritySettings().read(view, seed=0, name=NAME)


def test_labels_of_a_regression_are_refused() -> None:
    rows, labels = planted(20)
    view = view_of(rows, known(labels))
    object.__setattr__(view, "known_labels", known(labels).double() / 2)
    with pytest.raises(UnfitViewError, match="not the values of a regression"):
        SimilaritySettings().read(view, seed=0, name=NAME)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"seat": "clinet"}, "did you mean 'client'"),
        ({"evidence": "smash"}, "did you mean 'smashed'"),
        ({"reduction": "pcaa"}, "did you mean 'pca'"),
        ({"width": 0}, "width is 0"),
    ],
)
def test_illegal_settings_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SimilaritySettings(**settings)  # type: ignore[arg-type]
