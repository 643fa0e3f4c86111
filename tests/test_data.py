"""Image data: recognised layouts, official labels, reproducible order and error messages."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as some_settings
from hypothesis import strategies as some
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode

import taps
from taps.data.checks import check
from taps.data.classification import domainnet
from taps.data.classification.folders import Reading, find_tasks, read_table
from taps.data.classification.images import (
    TaskData,
    make_loader,
    read_image,
    split_validation,
    without_bad_images,
)
from taps.data.generated.demo import DOMAINS, SPLITS, make_demo, read_demo
from taps.networks.preprocessing import Preprocessing, stored_transform

LISTS = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "domainnet_txt"
needs_lists = pytest.mark.skipif(not LISTS.is_dir(), reason="the official DomainNet lists are not here")


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 10, 10)).save(path)


def test_folders(tree):
    tasks = find_tasks([tree])
    assert [task.name for task in tasks] == ["ink-2", "paint"]
    assert [task.name for task in find_tasks([tree / "paint", tree / "ink-2"])] == ["paint", "ink-2"]
    paint = tasks[1]
    assert paint.classes == ("class0", "class1", "class2")
    assert Counter(label for _, label in paint.train) == {0: 12, 1: 12, 2: 12}
    assert all(f"class{label}" in path and "/train/" in path for path, label in paint.train)
    assert len(paint.test) == 15
    assert paint.val is None


def test_cropped_sets_are_stretched(tmp_path):
    for name in ("cubs_cropped", "flowers"):
        for split in ("train", "test"):
            picture(tmp_path / name / split / "a" / "1.png")
    assert {task.name: task.stretch for task in find_tasks([tmp_path])} == {"cubs_cropped": True, "flowers": False}
    assert all(task.stretch for task in find_tasks([tmp_path], Reading(cropped=True)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "is not a dataset: it needs train/ and test/"),
        (lambda root: picture(root / "train/a/1.png"), "leaves none to test on"),
        (lambda root: picture(root / "test/a/1.png"), "has no train/ folder"),
        (lambda root: [(root / s / "a").mkdir(parents=True) for s in ("train", "test")], "train has no images"),
        (
            lambda root: [picture(root / p) for p in ("train/a/1.png", "test/a/1.png", "test/b/1.png")],
            "test/ has classes that train/ lacks: b",
        ),
        (lambda root: root.write_text("x"), "is not a folder"),
    ],
)
def test_wrong_folders(tmp_path, make, message):
    root = tmp_path / "set"
    make(root)
    with pytest.raises(ValueError, match=message) as caught:
        find_tasks([root])
    assert "\n" not in str(caught.value)


def pictures(root: Path, *folders: str, count: int = 10) -> Path:
    for folder in folders:
        for number in range(count):
            picture(root / folder / f"{number}.png")
    return root


def test_a_folder_of_classes_is_divided_by_the_seed(tmp_path):
    root = pictures(tmp_path / "fruit", "apple", "pear", ".thumbs", "__MACOSX")
    task = find_tasks([root])[0]
    assert (task.name, task.classes) == ("fruit", ("apple", "pear"))
    assert Counter(label for _, label in task.test) == {0: 2, 1: 2}
    assert len(task.train) == 16
    assert not set(task.train) & set(task.test)
    assert task.notes[1:] == ("there is no test/, so 4 images are tested on: 20% of each class, chosen with seed 0",)
    assert find_tasks([root])[0] == task
    assert find_tasks([root], Reading(seed=1))[0].test != task.test
    assert len(find_tasks([root], Reading(test_fraction=0.5))[0].test) == 10


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_without_test_images_the_validation_images_are_tested_on(name, tmp_path):
    root = pictures(tmp_path / "fruit", "train/apple", "train/pear", f"{name}/apple", f"{name}/pear")
    task = find_tasks([root])[0]
    assert len(task.test) == 20
    assert task.val is None
    assert task.notes == (f"there is no test/, so {name}/ is tested on, and validation images come from train/",)
    whole = find_tasks([pictures(root, "test/apple")])[0]
    assert (len(whole.val), len(whole.test), whole.notes) == (20, 10, ())


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("train", "Testing")])
def test_other_names_of_splits(names, tmp_path):
    task = find_tasks([pictures(tmp_path / "fruit", *(f"{split}/{label}" for split in names for label in "ab"))])[0]
    assert (task.classes, len(task.train), len(task.test)) == (("a", "b"), 20, 20)


def test_folders_that_are_no_classes_are_refused(tmp_path):
    root = pictures(tmp_path / "places", "seg_test/sea", "seg_train/sea", count=1)
    with pytest.raises(taps.UserError, match="seg_test and seg_train, which look like splits: rename them to train"):
        find_tasks([root])
    root = pictures(tmp_path / "DomainNet", "clipart/cat", "real/cat", count=1)
    with pytest.raises(taps.UserError, match=r"lacks DomainNet's lists: put clipart_train.txt"):
        find_tasks([root])


@pytest.mark.parametrize(
    "folders", [("Training/a", "Match/b"), ("steam_train", "freight_train"), ("painting", "sketch")]
)
def test_folders_of_classes_that_only_sound_like_something_else(folders, tmp_path):
    task = find_tasks([pictures(tmp_path / "set", *folders)])[0]
    assert task.classes == tuple(sorted(folder.partition("/")[0] for folder in folders))


def test_flat_splits_are_refused_and_folders_beside_splits_are_named(tmp_path):
    root = pictures(tmp_path / "flat", "train", "test", "annotations", count=1)
    with pytest.raises(
        taps.UserError, match="holds test and train, which look like splits: in each, give every class a"
    ):
        find_tasks([root])
    root = pictures(tmp_path / "half", "train/a", "train/b", "test", count=1)
    with pytest.raises(taps.UserError, match="test has no images; it needs one folder of images per class"):
        find_tasks([root])
    root = pictures(tmp_path / "more", "train/a", "train/b", "test/a", "test/b", "unlabelled", count=2)
    assert find_tasks([root])[0].notes == ("folders with images beside the splits are left out: unlabelled",)


def test_a_class_may_be_called_train(tmp_path):
    task = find_tasks([pictures(tmp_path / "vehicles", "bus", "train", "train/.ipynb_checkpoints")])[0]
    assert (task.classes, len(task.train), len(task.test)) == (("bus", "train"), 16, 4)


def test_images_beside_the_classes_are_counted_and_links_are_followed(tmp_path):
    root = pictures(tmp_path / "fruit", "apple", "pear")
    picture(root / "unsorted.png")
    pictures(tmp_path / "more", "batch")
    (root / "pear/batch").symlink_to(tmp_path / "more/batch")
    (root / "pear/batch/again").symlink_to(root / "pear")  # a circle
    task = find_tasks([root])[0]
    assert len(task.train) + len(task.test) == 30
    assert f"1 images are in no class folder and left out, e.g. {root / 'unsorted.png'}" in task.notes


def test_all_images_of_data_without_a_division_are_tested_on_if_asked(tmp_path):
    every = Reading(all_tested=True)
    task = find_tasks([pictures(tmp_path / "fruit", "apple", "pear")], every)[0]
    assert (len(task.train), len(task.test)) == (0, 20)
    task = find_tasks([pictures(tmp_path / "tests", "test/apple")], every)[0]
    assert (task.classes, len(task.train), len(task.test)) == (("apple",), 0, 10)
    (tmp_path / "own.csv").write_text("path,label,split\na.png,x,test\nb.png,y,test\n")
    assert len(find_tasks([tmp_path / "own.csv"], every)[0].test) == 2


def test_training_images_alone_are_divided(tmp_path):
    task = find_tasks([pictures(tmp_path / "fruit", "train/apple", "train/pear")])[0]
    assert (len(task.train), len(task.test), task.val) == (16, 4, None)


def test_hidden_files_and_folders_are_no_images(tmp_path):
    root = pictures(tmp_path / "fruit", "train/apple", "train/pear", "test/apple", "test/pear")
    for hidden in (
        ".ipynb_checkpoints/a.png",
        "@eaDir/a.png",
        "__MACOSX/a.png",
        ".a.png",
        "Thumbs.db",
        "inner/.b/a.png",
    ):
        picture(root / "train/apple" / hidden) if hidden != "Thumbs.db" else (root / hidden).write_bytes(b"")
    (root / "train/pear/folder.png").mkdir()
    (root / "train/empty").mkdir()
    task = find_tasks([root])[0]
    assert len(task.train) == 20
    assert [note.split(",")[0] for note in task.notes] == [
        "no class",
        "5 hidden images are left out",
    ]
    assert "empty" in task.notes[0]


@pytest.mark.parametrize("ending", ["jfif", "jpe", "jp2", "avif", "tga", "bmp", "tiff", "webp"])
def test_every_format_that_pillow_reads_is_an_image(ending, tmp_path):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        path = tmp_path / "set" / name / f"0.{ending}"
        path.parent.mkdir(parents=True)
        kind = {"jfif": "JPEG", "jpe": "JPEG", "jp2": "JPEG2000"}.get(ending)
        Image.new("RGB", (16, 16), (200, 10, 10)).save(path, kind)
    task = find_tasks([tmp_path / "set"])[0]
    assert len(task.train) == 2
    assert read_image(task.train[0][0]).getpixel((8, 8))[0] > 150


def stored(tmp_path: Path, image: Image.Image, ending: str, **options) -> Image.Image:
    path = tmp_path / f"image.{ending}"
    image.save(path, **options)
    return read_image(str(path))


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_scaled(ending, tmp_path):
    values = np.array([[0, 257, 128 * 257], [65535, 300, 40000]], dtype=np.uint16)
    image = stored(tmp_path, Image.fromarray(values), ending)
    expected = np.round(values / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(image), np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_range_are_refused(mode, tmp_path):
    with pytest.raises(ValueError, match=r"image.tiff cannot be read \(pixel mode . does not say"):
        stored(tmp_path, Image.new(mode, (4, 4)), "tiff")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation, tmp_path):
    upright = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3)
    turns = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
    }
    turns[8] = "ROTATE_270"
    kept = upright if orientation == 1 else upright.transpose(getattr(Image.Transpose, turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(stored(tmp_path, kept, "png", exif=exif)), np.asarray(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(mode, tmp_path):
    drawing = Image.new("RGBA", (4, 4), (0, 0, 0, 0))  # black ink on a transparent ground, whose hidden colour is black
    drawing.putpixel((1, 1), (0, 0, 0, 255))
    image = stored(tmp_path, drawing.convert(mode) if mode != "P" else drawing.quantize(), "png")
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 1)) == (0, 0, 0)
    half = stored(tmp_path, Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "png")
    assert half.getpixel((0, 0)) == (127, 127, 127)


def test_odd_files_are_read_or_named(tmp_path):
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    first = stored(tmp_path, frames[0], "gif", save_all=True, append_images=frames[1:])
    assert first.getpixel((0, 0)) == (255, 0, 0)
    strip = stored(tmp_path, Image.new("L", (4000, 1), 7), "png")
    assert Preprocessing(32, 37).transform(False)(strip).shape == (3, 32, 32)
    (tmp_path / "empty.png").write_bytes(b"")
    bomb = tmp_path / "bomb.png"
    Image.new("1", (30000, 30000)).save(bomb)
    whole = tmp_path / "whole.jpg"
    Image.new("RGB", (64, 64)).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:300])
    for name in ("empty.png", "bomb.png", "cut.jpg"):
        with pytest.raises(ValueError, match=f"{name} cannot be read") as caught:
            read_image(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_a_table_is_a_task(tmp_path):
    pictures(tmp_path / "images", ".", count=20)
    lines = [f"images/{number}.png , {10 if number % 2 else 9}" for number in range(20)]
    (tmp_path / "own.csv").write_text("\ufeffpath,label\r\n" + "\r\n".join(lines))
    task = find_tasks([tmp_path / "own.csv"])[0]
    assert (task.name, task.classes, len(task.train), len(task.test)) == ("own", ("9", "10"), 16, 4)
    assert all(Path(path).is_file() for path, _ in task.train)
    lines = [f"images/{number}.png,x{number % 2},{('train', 'val', 'test')[number % 3]}" for number in range(18)]
    (tmp_path / "own.csv").write_text("path,label,split\n" + "\n".join(lines))
    task = find_tasks([tmp_path / "own.csv"])[0]
    assert (len(task.train), len(task.val), len(task.test), task.notes) == (6, 6, 6, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,1\n", "own.csv has no column 'path'"),
        ("path,label\na.png\n", "own.csv, line 2: path or label is missing"),
        ("path,label,split\na.png,1,dev\n", "own.csv, line 2: split 'dev' is not train, val or test"),
        ("path,label,split\na.png,1,test\n", "own.csv lists no training images"),
        ("path,label\n", "own.csv lists no training images"),
        ("path,cat,dog\na.png,1,2\n", "own.csv, line 2: column 'dog' is '2'; .* each column is a label and has 0 or 1"),
        ("path,label\na.png,1\na.png,2\n", "own.csv, line 3: a.png is there twice, with another label; several labels"),
        (
            "path,label,split\na.png,1,test\na.png,1,train\n",
            "own.csv, line 3: a.png is there twice, with another split",
        ),
        ("path,cat\na.png,1\n", "own.csv has no column 'label'"),
        ("path,labels,split\na.png,x;y,dev\n", "own.csv, line 2: split 'dev' is not train, val or test"),
    ],
)
def test_a_wrong_table_is_one_line(text, message, tmp_path):
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_tasks([tmp_path / "own.csv"])


def test_columns_of_labels_keep_their_names(tmp_path):
    (tmp_path / "a.csv").write_text(
        "Path,Split,Dog,cat\n" + "".join(f"{n}.png,{s},1,0\n" for n, s in ((1, "train"), (2, "test")))
    )
    assert read_table(tmp_path / "a.csv").classes == ("Dog", "cat")
    (tmp_path / "b.csv").write_text("path,Dog,Dog\n1.png,1,0\n")
    with pytest.raises(taps.UserError, match="two columns 'Dog'"):
        read_table(tmp_path / "b.csv")


def test_the_digest_of_a_task_does_not_depend_on_its_place(tmp_path):
    first, second = (pictures(tmp_path / place / "fruit", "apple", "pear") for place in ("a", "b/c"))
    assert find_tasks([first])[0].digest() == find_tasks([second])[0].digest()
    (second / "apple/0.png").rename(second / "apple/new.png")
    assert find_tasks([first])[0].digest() != find_tasks([second])[0].digest()


def test_duplicate_names(tree):
    with pytest.raises(ValueError, match="two tasks have the name 'paint'"):
        find_tasks([tree / "paint", tree / "paint"])


@needs_lists
def test_official_lists_prove_labels_and_missing_classes():
    names = domainnet.class_names(LISTS)
    assert len(set(names)) == 345
    assert not any(name.startswith("class_") for name in names)
    assert (names[300], names[327], names[308]) == ("syringe", "t-shirt", "The_Eiffel_Tower")
    assert domainnet.official_order(random.Random(0).sample(names, 345)) == list(names)
    assert sum(a != b for a, b in zip(sorted(names), names, strict=True)) == 328
    for domain in domainnet.listed_domains(LISTS):
        for split in ("train", "test"):
            for path, label in domainnet.read_list(LISTS / f"{domain}_{split}.txt"):
                assert path.startswith(f"{domain}/{names[label]}/")
    train = {label for _, label in domainnet.read_list(LISTS / "painting_train.txt")}
    test = {label for _, label in domainnet.read_list(LISTS / "painting_test.txt")}
    assert set(range(345)) - train == {327}
    assert set(range(345)) - test == {300}
    assert Counter(label for _, label in domainnet.read_list(LISTS / "painting_test.txt"))[327] == 2


def domainnet_root(root: Path) -> Path:
    """Create a root as unpacked from the zips and lists: two distant classes, one missing from painting's training split."""
    lines = {
        "painting_train": ["painting/aircraft_carrier/a.png 0", "painting/aircraft_carrier/b.png 0"],
        "painting_test": ["painting/t-shirt/c.png 327", "painting/aircraft_carrier/d.png 0"],
        "sketch_train": ["sketch/aircraft_carrier/e.png 0", "sketch/t-shirt/f.png 327", "sketch/train/h.png 321"],
        "sketch_test": ["sketch/t-shirt/g.png 327"],
    }
    root.mkdir()
    for name, entries in lines.items():
        (root / f"{name}.txt").write_text("\n".join(entries) + "\n")
        for entry in entries:
            picture(root / entry.split()[0])
    return root


def test_domainnet_by_lists(tmp_path):
    root = domainnet_root(tmp_path / "DomainNet")
    tasks = find_tasks([root])
    assert [task.name for task in tasks] == ["painting", "sketch"]
    assert all(task.stretch for task in find_tasks([root], Reading(cropped=True)))
    painting = find_tasks([root / "painting"])[0]
    assert painting == tasks[0]
    assert len(painting.classes) == 345
    assert painting.classes[327] == "t-shirt"
    assert [label for _, label in painting.test] == [327, 0]
    assert [note.split(" has no image of ")[0] for note in painting.notes] == ["train", "test"]
    sketch = find_tasks([root / "sketch"])[0]  # which has a class called train
    assert (sketch, sketch.classes[321]) == (tasks[1], "train")
    (root / "sketch/t-shirt/g.png").unlink()
    assert "  missing: " + str(root / "sketch/t-shirt/g.png") in check(root / "sketch")[0]
    (root / "painting_train.txt").write_text("painting/aircraft_carrier/a.png zero\n")
    domainnet.read_list.cache_clear()
    with pytest.raises(ValueError, match=r"painting_train.txt, line 1: expected"):
        find_tasks([root])


def test_domainnet_lists_without_images(tmp_path):
    root = domainnet_root(tmp_path / "DomainNet")
    domainnet.read_list.cache_clear()
    import shutil

    shutil.rmtree(root / "sketch")
    with pytest.raises(ValueError, match=r"the images of sketch are not under .* unpack sketch.zip"):
        find_tasks([root])
    lines, wrong = check(root)
    assert "sketch_test.txt: 1 images, not the official cleaned list" in "\n".join(lines)
    assert "missing: sketch/t-shirt/g.png" in "\n".join(lines)
    assert wrong == 8 + 4 + 4


def test_domainnet_rearranged_keeps_official_order_and_missing_classes(tmp_path):
    names = ["syringe", "t-shirt", "The_Eiffel_Tower", *(f"kind_{number:03}" for number in range(342))]
    for name in names:
        for split in ("train", "test"):
            (tmp_path / "painting" / split / name).mkdir(parents=True)
    for path in ("train/syringe/1.png", "train/The_Eiffel_Tower/1.png", "test/t-shirt/1.png", "test/syringe/1.png"):
        picture(tmp_path / "painting" / path)
    painting = find_tasks([tmp_path / "painting"])[0]
    assert [painting.classes[label] for _, label in painting.test] == ["syringe", "t-shirt"]
    assert painting.classes.index("The_Eiffel_Tower") < painting.classes.index("t-shirt"), "case does not matter"
    assert len(painting.classes) == 345


def test_a_folder_that_only_shares_a_domain_s_name_is_an_ordinary_one(tmp_path):
    for path in ("train/b/1.png", "train/A/1.png", "test/b/1.png"):
        picture(tmp_path / "sketch" / path)
    assert find_tasks([tmp_path / "sketch"])[0].classes == ("A", "b")
    picture(tmp_path / "sketch/test/c/1.png")
    with pytest.raises(ValueError, match="classes that train/ lacks: c"):
        find_tasks([tmp_path / "sketch"])


def test_check_counts(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for number in range(count):
            picture(tmp_path / "flowers" / split / "a" / f"{number}.png")
    lines, wrong = check(tmp_path / "flowers")
    assert wrong == 3
    assert "  train: 2037 missing (3 of 2040)" in lines
    assert "  classes: 101 missing (1 of 102)" in lines


def test_validation_split_is_seeded_stratified_and_disjoint():
    train = tuple((f"{label}/{number}", label) for label, size in enumerate((40, 8, 8, 1, 3)) for number in range(size))
    task = TaskData("t", tuple("abcde"), train, train[:1])
    split = split_validation(task, 0.25, seed=1)
    assert set(split.train) | set(split.val) == set(train)
    assert not set(split.train) & set(split.val)
    assert len(split.val) == 15
    assert {label for _, label in split.train} == set(range(5)), "every class keeps a training image"
    assert Counter(label for _, label in split.val)[0] == 10
    assert split_validation(task, 0.25, seed=1) == split
    assert split_validation(task, 0.25, seed=2) != split
    assert split_validation(task, 0, seed=1) == task
    given = replace(task, val=train[:2])
    assert split_validation(given, 0.25, seed=1) == given
    with pytest.raises(ValueError, match="leaves none to validate on"):
        split_validation(task, 0.001, seed=1)


def epoch_of(tree, workers: int, epoch: int, seed: int = 0):
    paint = find_tasks([tree / "paint"])[0]
    loader, sampler = make_loader(
        paint.train, Preprocessing(16, 18).transform(True), 5, train=True, seed=seed, workers=workers
    )
    sampler.epoch = epoch
    return list(loader)


def test_order_and_transforms_depend_on_seed_and_epoch_alone(tree):
    first = epoch_of(tree, 0, 3)
    torch.rand(7)
    again = epoch_of(tree, 2, 3)
    for (x, y), (x2, y2) in zip(first, again, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    assert not torch.equal(first[0][0], epoch_of(tree, 0, 4)[0][0])
    assert not torch.equal(first[0][0], epoch_of(tree, 0, 3, seed=1)[0][0])


def test_loading_images_leaves_the_global_generator_alone(tree):
    before = torch.get_rng_state()
    epoch_of(tree, 0, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_single_left_over_image_is_left_out_of_training_only(tree):
    paint = find_tasks([tree / "paint"])[0]
    for train, expected in ((True, 35), (False, 36)):
        loader, _ = make_loader(paint.train, Preprocessing(16, 18).transform(train), 35, train=train)
        assert sum(len(labels) for _, labels in loader) == expected


def test_transforms():
    prepare = Preprocessing(32, 40, mean=(0.5,) * 3, std=(0.5,) * 3)
    wide = Image.new("RGB", (200, 50))
    wide.paste((255, 255, 255), (0, 0, 20, 50))  # a white left edge: only a stretched image still shows it
    stretched, centre = prepare.transform(False, stretch=True)(wide), prepare.transform(False)(wide)
    assert stretched.shape == centre.shape == (3, 32, 32)
    assert stretched[:, :, 0].min() > 0.9
    assert centre.max() == -1
    torch.manual_seed(0)
    assert prepare.transform(True, stretch=True, flip=False)(wide)[:, :, 0].min() > 0.9


def test_odd_images_are_read_as_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "1", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (4, 4)).save(path)
        assert read_image(str(path)).mode == "RGB"


def test_bad_images_are_named_or_skipped_and_counted(tmp_path):
    for name in ("train/a/1.png", "train/a/2.png", "test/a/1.png"):
        picture(tmp_path / name)
    big = tmp_path / "train/a/3.jpg"
    Image.effect_noise((64, 64), 50).save(big)
    big.write_bytes(big.read_bytes()[:700])
    (tmp_path / "train/a/4.png").write_text("no image")
    task = find_tasks([tmp_path])[0]
    for path in (big, tmp_path / "train/a/4.png"):
        with pytest.raises(ValueError, match=f"image {path} cannot be read.*--skip_bad_images"):
            read_image(str(path))
    kept, bad = without_bad_images(task)
    assert bad == sorted([str(big), str(tmp_path / "train/a/4.png")])
    assert len(kept.train) == 2
    (tmp_path / "test/a/1.png").write_text("no image")
    with pytest.raises(ValueError, match="none of the 1 images in test can be read"):
        without_bad_images(task)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets") / "demo"
    make_demo(root)
    return root


def test_demo_data(demo):
    tasks = read_demo(demo)
    assert [task.name for task in tasks] == list(DOMAINS)
    assert all((len(task.train), len(task.test)) == (400, 300) for task in tasks)
    assert [len(task.classes) for task in tasks] == [10, 10, 10, 10, 8, 6]
    for task in tasks:
        train = {Path(path).read_bytes() for path, _ in task.train}
        test = {Path(path).read_bytes() for path, _ in task.test}
        assert not train & test, "no picture is in both splits"
    stamp = (demo / "digits").stat().st_mtime_ns
    make_demo(demo)
    assert (demo / "digits").stat().st_mtime_ns == stamp, "it is written once"
    assert [task.name for task in find_tasks([demo])] == sorted(DOMAINS), "an ordinary image-folder tree"


def test_the_development_copy_shows_nothing_of_the_test_images():
    every = set(range(1797))
    digits = {key: {*sorted(every)[source.digits]} for key, source in SPLITS.items()}
    strips = {key: {*source.strips} for key, source in SPLITS.items()}
    for found in (digits, strips):
        train, test, choose, judge = found.values()
        assert not train & test
        assert not choose & judge
        assert choose | judge == train


@pytest.mark.parametrize(
    ("background", "expected"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ("red", (255, 0, 0))]
)
def test_the_ground_under_transparent_pixels(background, expected):
    prepare = Preprocessing(4, 4, mean=(0.0,) * 3, std=(1.0,) * 3, background=background)
    for again in (prepare.transform(False), prepare.transform(True), stored_transform(prepare.describe())):
        pixel = again(Image.new("RGBA", (4, 4), (9, 9, 9, 0)))[:, 1, 1]
        torch.testing.assert_close(pixel, torch.tensor(expected) / 255)
    assert stored_transform({k: v for k, v in prepare.describe().items() if k not in ("background", "published")})
    with pytest.raises(ValueError, match="background 'whit' is not a colour; examples are white, grey and #ff8000"):
        Preprocessing(background="whit").transform(False)


def test_published_reading_only_converts_the_mode(tmp_path):
    prepare = Preprocessing(4, 4, mean=(0.0,) * 3, std=(1.0,) * 3, published=True)
    read = stored_transform(prepare.describe(stretch=True))
    exif = Image.Exif()
    exif[0x0112] = 3
    half = Image.new("RGB", (4, 4))
    half.paste((255, 255, 255), (0, 0, 2, 4))
    half.save(tmp_path / "turned.png", exif=exif)
    assert read_image(str(tmp_path / "turned.png"), read)[0, 0, 0] == 1
    Image.fromarray(np.full((4, 4), 300, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_image(str(tmp_path / "deep.png"), read).min() == 1
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(str(tmp_path / "clear.png"), read)[:, 0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (3, 100), (61, 3)])
def test_a_strip_is_cropped_before_it_is_enlarged(size):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    prepare = Preprocessing(16, 18, interpolation="bicubic")
    plain = v2.Compose([v2.Resize(18, InterpolationMode.BICUBIC), v2.CenterCrop(16), v2.PILToTensor()])(noise)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (prepare.mean, prepare.std))
    found = prepare.transform(False)(noise) * std + mean
    shift = min(float((found - plain.roll(by, dim) / 255).abs().mean()) for by in (-1, 0, 1) for dim in (1, 2))
    assert shift < 0.02


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_plain_tiffs_are_turned_upright(mode, orientation, tmp_path):
    shape = {"RGB": (4, 6, 3), "RGBA": (4, 6, 4)}.get(mode, (4, 6))
    values = (np.arange(np.prod(shape)) % 250).reshape(shape).astype(np.uint16 if mode == "I;16" else np.uint8)
    values = values * 257 if mode == "I;16" else values
    if mode == "RGBA":
        values[..., 3] = 255
    image = Image.fromarray(values)
    image.save(tmp_path / "o.tif", tiffinfo={0x112: orientation})
    grey = values // 257 if mode == "I;16" else values
    expected = {3: grey[::-1, ::-1], 6: np.rot90(grey, -1), 8: np.rot90(grey)}[orientation]
    found = np.asarray(read_image(str(tmp_path / "o.tif")))
    assert np.array_equal(
        found if expected.ndim == 3 else found[..., 0], expected[..., :3] if expected.ndim == 3 else expected
    )


def test_grey_of_many_bits_with_a_transparent_value_or_white_as_zero(tmp_path):
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    image.save(tmp_path / "t.png", transparency=0)
    assert np.asarray(read_image(str(tmp_path / "t.png")))[0, :, 0].tolist() == [255, 1, 255]
    image.save(tmp_path / "w.tif", tiffinfo={0x106: 0})
    with Image.open(tmp_path / "w.tif") as stored:
        inverted = stored.tag_v2[0x106] == 0
    if inverted:
        assert np.asarray(read_image(str(tmp_path / "w.tif")))[0, :, 0].tolist() == [255, 254, 0]


@some_settings(max_examples=150, deadline=None, derandomize=True)
@given(some.data())
def test_images_of_every_mode_size_and_turn_are_read_right(tmp_path_factory, data):
    """Against values computed from the pixels that were stored."""
    mode = data.draw(some.sampled_from(("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "YCbCr")))
    suffixes = {
        "1": ("png", "tiff", "bmp", "gif"), "L": ("png", "tiff", "bmp", "gif", "pgm", "webp"), "P": ("png", "tiff", "bmp", "gif"),
        "RGB": ("png", "tiff", "bmp", "ppm", "webp", "tga"), "RGBA": ("png", "tiff", "webp", "tga"), "LA": ("png", "tiff", "tga"),
        "CMYK": ("tiff",), "I;16": ("png", "tiff"), "YCbCr": ("tiff",),
    }  # fmt: skip
    suffix = data.draw(some.sampled_from(suffixes[mode]))
    width, height = data.draw(some.integers(1, 9)), data.draw(some.integers(1, 9))
    generator = np.random.default_rng(data.draw(some.integers(0, 99)))
    if mode == "I;16":
        values = generator.integers(0, 65536, (height, width), dtype=np.uint16)
        image, expected = Image.fromarray(values), np.stack([np.round(values / 257)] * 3, axis=-1)
    else:
        colours = Image.fromarray(generator.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
        image = colours.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else colours.convert(mode)
        if mode in ("RGBA", "LA"):
            alpha = np.asarray(image)[..., -1:] / 255.0
            opaque = np.asarray(image.convert("RGBA"))[..., :3]
            expected = opaque * alpha + 255 * (1 - alpha)
        else:
            expected = np.asarray(image.convert("RGB"), dtype=float)
    path, options = tmp_path_factory.getbasetemp() / f"any.{suffix}", {"lossless": True} if suffix == "webp" else {}
    turn = data.draw(some.integers(1, 8)) if suffix in ("png", "webp") else 1
    if turn != 1:
        exif = Image.Exif()
        exif[0x0112] = turn
        options["exif"] = exif
    image.save(path, **options)
    turned = {
        1: expected, 2: expected[:, ::-1], 3: expected[::-1, ::-1], 4: expected[::-1], 5: expected.transpose(1, 0, 2),
        6: np.rot90(expected, -1), 7: np.rot90(expected, 2).transpose(1, 0, 2), 8: np.rot90(expected),
    }  # fmt: skip
    found = np.asarray(read_image(str(path)), dtype=float)
    assert found.shape == turned[turn].shape
    assert np.abs(found - turned[turn]).max() <= 1.5
