import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from leakbed.data import (
    BadDataError,
    EmptyClassError,
    MissingDataError,
    TooLargeError,
    folders,
    load,
    memory,
)


def paint(path: Path, value: int, *, mode: str = "L", size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).convert(mode).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of two grey images, 4 high and 6 wide."""
    for label, name in enumerate(("cat", "dog")):
        for index in range(2):
            paint(tmp_path / name / f"{index}.png", 100 * label + index)
    return tmp_path


def test_classes_and_files_are_read_in_name_order(tree: Path) -> None:
    data = load("image-folder", root=tree)
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.image_shape == (1, 4, 6)
    assert (data.images[:, 0, 0, 0] * 255).round().tolist() == [0, 1, 100, 101]
    assert data.official_test == 0


def test_train_and_test_are_pooled_with_test_last(tmp_path: Path) -> None:
    for part, value in (("test", 9), ("train", 5)):
        for name in ("cat", "dog"):
            paint(tmp_path / part / name / "0.png", value)
    data = load("image-folder", root=tmp_path)
    assert data.official_test == 2
    assert (data.images[:, 0, 0, 0] * 255).round().tolist() == [5, 5, 9, 9]
    assert data.labels.tolist() == [0, 1, 0, 1]


def test_train_without_test_is_read(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "cat" / "0.png", 100)
    assert load("image-folder", root=tmp_path).official_test == 0


def test_one_coloured_image_makes_the_folder_coloured(tree: Path) -> None:
    Image.new("RGB", (6, 4), (10, 20, 30)).save(tree / "dog" / "1.png")
    data = load("image-folder", root=tree)
    assert data.image_shape == (3, 4, 6)
    assert (data.images[3, :, 0, 0] * 255).round().tolist() == [10, 20, 30]
    assert (data.images[2, :, 0, 0] * 255).round().tolist() == [100, 100, 100]


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA"])
def test_other_modes_are_converted(tmp_path: Path, mode: str) -> None:
    paint(tmp_path / "cat" / "0.png", 255, mode=mode)
    data = load("image-folder", root=tmp_path)
    assert data.image_shape[0] == (1 if mode in {"1", "LA"} else 3)
    assert data.images.unique().tolist() == [1]


def test_resizing_is_to_a_square_and_only_when_asked(tree: Path) -> None:
    paint(tree / "dog" / "1.png", 7, size=(9, 9))
    with pytest.raises(BadDataError, match=r"dog/1.png is 9x9 pixels, but .*cat/0.png is 4x6"):
        load("image-folder", root=tree)
    data = load("image-folder", root=tree, image_size=5)
    assert data.image_shape == (1, 5, 5)
    assert data.images[3].mul(255).round().unique().tolist() == [7]


def test_a_corrupt_image_is_named(tree: Path) -> None:
    (tree / "dog" / "0.png").write_bytes(b"not a picture")
    with pytest.raises(BadDataError, match=r"dog/0.png is not an image that can be read"):
        load("image-folder", root=tree)


def test_a_truncated_image_is_named(tree: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(tree / "dog" / "0.jpg")
    whole = (tree / "dog" / "0.jpg").read_bytes()
    (tree / "dog" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadDataError, match=r"dog/0.jpg is not an image that can be read: .*trunc"):
        load("image-folder", root=tree, image_size=8)


def test_sixteen_bits_are_refused(tree: Path) -> None:
    Image.fromarray(np.full((4, 6), 60000, dtype=np.uint16)).save(tree / "dog" / "0.png")
    with pytest.raises(BadDataError, match=r"dog/0.png has mode 'I;16', more than 8 bits"):
        load("image-folder", root=tree)


@pytest.mark.parametrize("leftover", [None, "notes.txt"])
def test_an_empty_class_is_named(tree: Path, leftover: str | None) -> None:
    (tree / "eel").mkdir()
    if leftover:
        (tree / "eel" / leftover).write_text("no image")
    with pytest.raises(EmptyClassError, match="class 'eel' has no image"):
        load("image-folder", root=tree)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"no folder .*nowhere.*images per class"):
        load("image-folder", root=tmp_path / "nowhere")
    with pytest.raises(MissingDataError, match="holds no class folders"):
        load("image-folder", root=tmp_path)


def test_parts_with_different_classes_are_refused(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "cat" / "0.png", 1)
    paint(tmp_path / "test" / "dog" / "0.png", 1)
    with pytest.raises(BadDataError, match="different classes: cat against dog"):
        load("image-folder", root=tmp_path)


def test_a_third_part_is_not_silently_left_out(tmp_path: Path) -> None:
    for part in ("train", "val"):
        paint(tmp_path / part / "cat" / "0.png", 1)
    with pytest.raises(BadDataError, match="also val/, which would not be read"):
        load("image-folder", root=tmp_path)


def test_the_result_owns_its_memory(tree: Path) -> None:
    images = load("image-folder", root=tree).images
    assert images.is_contiguous()
    assert images.dtype == torch.float32


@pytest.mark.parametrize(
    "hidden", [".ipynb_checkpoints", "__MACOSX", "dog/.thumbnails", "dog/@eaDir", "dog/__MACOSX"]
)
def test_folders_that_programs_leave_behind_are_not_read(tree: Path, hidden: str) -> None:
    paint(tree / hidden / "0-checkpoint.png", 50)
    paint(tree / "dog" / "._1.png", 50)  # a file's attributes, as macOS leaves them
    data = load("image-folder", root=tree)
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("train", "test"), [("Training", "Testing"), ("Train", "Test"), ("TRAIN", "testing")]
)
def test_parts_are_told_by_their_usual_names(tmp_path: Path, train: str, test: str) -> None:
    for part, value in ((test, 9), (train, 5)):
        for name in ("cat", "dog"):
            paint(tmp_path / part / name / "0.png", value)
    data = load("image-folder", root=tmp_path)
    assert (data.classes, data.official_test) == (("cat", "dog"), 2)
    assert (data.images[:, 0, 0, 0] * 255).round().tolist() == [5, 5, 9, 9]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("Training", "Validation"), "holds Training/ and also Validation/, which would not"),
        (("val", "test"), "holds test/ and val/, parts of a set, but no train/"),
        (("train", "Training"), "holds Training/ and train/, two training parts"),
        (("fold-1", "fold-2"), "class folders seem to lie one level deeper.*, in fold-1 or fold-2"),
        (("archive",), "class folders seem to lie one level deeper.*, in archive"),
    ],
)
def test_parts_are_never_taken_for_classes(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    for part in names:
        for name in ("cat", "dog"):
            paint(tmp_path / part / name / "0.png", 1)
    with pytest.raises(BadDataError, match=message):
        load("image-folder", root=tmp_path)


def test_classes_may_have_folders_of_their_own(tmp_path: Path) -> None:
    paint(tmp_path / "training" / "one" / "0.png", 1)
    paint(tmp_path / "walking" / "two" / "images" / "0.png", 2)
    assert load("image-folder", root=tmp_path).classes == ("training", "walking")


@pytest.mark.parametrize(
    ("link", "target"),
    [("all", "."), ("dog/loop", "../.."), ("dog/up", ".."), ("eel", "cat"), ("dog/cats", "../cat")],
)
def test_a_link_that_would_read_images_twice_is_refused(
    tmp_path: Path, link: str, target: str
) -> None:
    for name in ("cat", "dog"):
        paint(tmp_path / "pets" / name / "0.png", 1)
    (tmp_path / "pets" / link).symlink_to(target, target_is_directory=True)
    with pytest.raises(BadDataError, match=rf"{link} is .*, whose images would be read twice"):
        load("image-folder", root=tmp_path / "pets")


def test_links_to_other_folders_are_followed(tree: Path, tmp_path: Path) -> None:
    paint(tmp_path / "elsewhere" / "0.png", 7)
    (tmp_path / "photos").mkdir()
    for name, target in (("cat", tree / "cat"), ("eel", tmp_path / "elsewhere")):
        (tmp_path / "photos" / name).symlink_to(target, target_is_directory=True)
    assert load("image-folder", root=tmp_path / "photos").labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("image_size", [None, 4])
def test_an_image_of_too_many_pixels_is_named(tree: Path, image_size: int | None) -> None:
    Image.new("1", (14_000, 14_000)).save(tree / "dog" / "huge.png")
    with pytest.raises(
        BadDataError, match=r"dog/huge.png is not an image that can be read: .*byt|pix"
    ):
        load("image-folder", root=tree, image_size=image_size)


def test_a_size_in_the_header_that_is_not_true_is_named(tree: Path) -> None:
    whole = (tree / "dog" / "0.png").with_suffix(".bmp")
    Image.new("L", (6, 4)).save(whole)
    content = bytearray(whole.read_bytes())
    content[18:26] = b"\xff\xff\x00\x00\xff\xff\x00\x00"  # width and height
    whole.write_bytes(content)
    with pytest.raises(BadDataError, match=r"dog/0.bmp is not an image that can be read"):
        load("image-folder", root=tree)


def test_a_picture_whose_ending_is_not_read_is_not_left_out_silently(tree: Path) -> None:
    Image.new("L", (6, 4)).save(tree / "dog" / "2.gif")
    with pytest.raises(BadDataError, match=r"dog/2.gif .*would not be read.*\.bmp, \.jpeg"):
        load("image-folder", root=tree)


def test_photographs_that_do_not_fit_into_memory_are_refused_before_they_are_decoded(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1000)
    monkeypatch.setattr(folders, "_decoded", None)
    with pytest.raises(TooLargeError, match=r"4 images of 1 x 4 x 6 need about .*data.image_size"):
        load("image-folder", root=tree)


def test_fewer_or_smaller_photographs_fit(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 300)
    assert load("image-folder", root=tree, image_size=2).image_shape == (1, 2, 2)
    monkeypatch.setattr(memory, "available", lambda: 800)
    assert len(load("image-folder", root=tree, size=2)) == 2


def test_a_class_whose_name_no_file_can_hold_is_refused(tree: Path) -> None:
    paint(tree / os.fsdecode(b"caf\xe9") / "0.png", 1)
    with pytest.raises(BadDataError, match=r"class 'caf\\udce9' .*rename"):
        load("image-folder", root=tree)
