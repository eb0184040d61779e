"""The answer key gives back the truth it was made from, for the targets it knows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from leakbed.contracts.attributes import UnfitAttributeError
from leakbed.events import Phase, Target
from leakbed.oracle.truth import AnswerKey, AnswerKeyError

IMAGES = torch.randint(0, 256, (1200, 1, 2, 2), generator=torch.Generator().manual_seed(0)) / 255


@pytest.fixture
def key() -> AnswerKey:
    return AnswerKey(
        images=IMAGES,
        labels=torch.arange(1200) % 10,
        test_images=IMAGES[:5],
        test_labels=torch.arange(5),
        order={(0, 1, 0): [3, 7], (0, 1, 1): [1, 2], (1, 1, 0): [1100, 9]},
        num_classes=10,
        public_images=IMAGES[:3],
        public_labels=torch.arange(3),
        bottom={"0.weight": np.ones((2, 2), np.float32)},
        classes=tuple(map(str, range(10))),
    )


def target(node: int, *, step: int = 0, row: int | None, phase: Phase = Phase.TRAIN) -> Target:
    return Target(node=node, round=1, step=step, row=row, phase=phase)


def test_survives_the_disk_exactly_and_privately(key: AnswerKey, tmp_path: Path) -> None:
    key.write(tmp_path / "answers")
    again = AnswerKey.read(tmp_path / "answers")
    for name in ("images", "labels", "test_images", "test_labels", "public_images"):
        assert torch.equal(getattr(again, name), getattr(key, name)), name
    assert again.order == key.order
    assert again.classes == key.classes
    assert again.bottom is not None
    np.testing.assert_array_equal(again.bottom["0.weight"], np.ones((2, 2)))
    assert all(f.stat().st_mode & 0o077 == 0 for f in (tmp_path / "answers").iterdir())


def test_images_that_are_not_eight_bit_survive_too(key: AnswerKey, tmp_path: Path) -> None:
    fine = replace(key, images=IMAGES / 3)
    fine.write(tmp_path / "answers")
    assert torch.equal(AnswerKey.read(tmp_path / "answers").images, IMAGES / 3)


def test_a_smashed_row_hides_one_sample(key: AnswerKey) -> None:
    truth = key.truth([target(0, step=1, row=1), target(1, row=0)])
    assert torch.equal(truth.images[:, 0], IMAGES[[2, 1100]])
    assert truth.labels.flatten().tolist() == [2, 0]
    assert len(truth.candidates) == 1000
    assert torch.equal(truth.candidates[truth.positions[:, 0]], IMAGES[[2, 1100]])


def test_an_update_hides_all_rows_of_all_steps(key: AnswerKey) -> None:
    truth = key.truth([target(0, row=None)])
    assert torch.equal(truth.images[0], IMAGES[[3, 7, 1, 2]])


def test_an_evaluated_row_is_a_test_row(key: AnswerKey) -> None:
    truth = key.truth([target(0, step=2, row=1, phase=Phase.EVALUATE)])
    assert torch.equal(truth.images[0, 0], IMAGES[3])
    assert len(truth.candidates) == 5, "all there are"


def test_refuses_to_answer_another_trace(key: AnswerKey, tmp_path: Path) -> None:
    for name in ("mine", "others"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.jsonl").write_text(name)
    key.write(tmp_path / "answers", trace=tmp_path / "mine")
    assert AnswerKey.read(tmp_path / "answers", trace=tmp_path / "mine").num_classes
    with pytest.raises(AnswerKeyError, match=r"answers another run than .*others"):
        AnswerKey.read(tmp_path / "answers", trace=tmp_path / "others")


def test_refuses_damaged_files(key: AnswerKey, tmp_path: Path) -> None:
    key.write(tmp_path)
    images = tmp_path / "images.safetensors"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(AnswerKeyError, match=r"images\.safetensors was altered or is missing"):
        AnswerKey.read(tmp_path)
    (tmp_path / "answers.json").write_text("{")
    with pytest.raises(AnswerKeyError, match="was altered or truncated"):
        AnswerKey.read(tmp_path)


def test_refuses_what_it_does_not_know(key: AnswerKey, tmp_path: Path) -> None:
    with pytest.raises(AnswerKeyError, match="another run"):
        key.truth([target(5, row=0)])
    with pytest.raises(AnswerKeyError, match="another run"):
        key.truth([target(5, row=None)])
    with pytest.raises(AnswerKeyError, match="no answer key"):
        AnswerKey.read(tmp_path)
    (tmp_path / "answers.json").write_text('{"format": "other"}')
    with pytest.raises(AnswerKeyError, match="'other'"):
        AnswerKey.read(tmp_path)


def test_the_truth_of_a_party_is_its_strip(key: AnswerKey, tmp_path: Path) -> None:
    parties = replace(key, parties=2, order={(node, 1, 0): [3, 7] for node in range(2)})
    parties.write(tmp_path / "answers")
    again = AnswerKey.read(tmp_path / "answers")
    for node in range(2):
        truth = again.truth([target(node, row=0), target(node, row=1)])
        assert torch.equal(truth.images[:, 0], IMAGES[[3, 7]][..., node : node + 1])
        assert truth.labels.flatten().tolist() == [3, 7]
        assert truth.public_images is not None
        assert truth.public_images.shape == (3, 1, 2, 1)
        held_out = again.truth([target(node, row=1, phase=Phase.EVALUATE)])
        assert torch.equal(held_out.images[0, 0], IMAGES[1][..., node : node + 1])
    with pytest.raises(AnswerKeyError, match="several parties has several shapes"):
        again.truth([target(0, row=0), target(1, row=0)])


def test_an_attribute_follows_from_the_classes(key: AnswerKey, tmp_path: Path) -> None:
    key.write(tmp_path / "answers")
    again = AnswerKey.read(tmp_path / "answers")
    targets = [target(0, step=0, row=1), target(0, step=1, row=1)]
    truth = again.truth(targets, attribute="high-digit")
    assert truth.labels.tolist() == [[7], [2]]
    assert truth.attributes is not None
    assert truth.attributes.tolist() == [[1], [0]]
    held_out = [target(0, step=2, row=1, phase=Phase.EVALUATE)]
    odd = again.truth(held_out, attribute="parity").attributes
    assert odd is not None
    assert odd.tolist() == [[1]]
    assert again.truth(targets).attributes is None
    with pytest.raises(UnfitAttributeError, match="unnamed"):
        replace(again, classes=()).truth(targets, attribute="parity")
