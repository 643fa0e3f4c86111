"""DomainNet (M3SDA, ICCV 2019): six domains, 345 classes, split by official text lists.

Each line of ``<domain>_train.txt`` and ``<domain>_test.txt`` is ``<domain>/<class>/<file> <label>``, with the path relative
to the folder the zips were unpacked in. The lists, not the folders, define the split and the labels: some classes have no
image in a split (``painting`` trains without t-shirt and tests without syringe), and their labels stay reserved.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from taps.data.classification.images import Sample, TaskData
from taps.errors import UserError

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
NUM_CLASSES = 345


def lists_folder(root: Path) -> Path:
    """The folder of the lists: ``root/txt`` if it exists, else ``root``."""
    return root / "txt" if (root / "txt").is_dir() else root


def has_lists(root: Path) -> bool:
    """Whether the folder holds a domain's train and test lists."""
    return bool(listed_domains(root))


def listed_domains(root: Path) -> list[str]:
    """Domains that have both lists."""
    folder = lists_folder(root)
    return [d for d in DOMAINS if all((folder / f"{d}_{split}.txt").is_file() for split in ("train", "test"))]


@cache
def read_list(path: Path) -> tuple[Sample, ...]:
    """(path relative to the root, label) for each line.

    Raises:
        UserError: with file and line, if a line has another form or a label is out of range.
    """
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        name, label = [*line.strip().rsplit(maxsplit=1), ""][:2]
        if not name or not label.isdecimal() or name.count("/") < 2:
            raise UserError(f"{path}, line {number}: expected '<domain>/<class>/<file> <label>', found {line[:80]!r}")
        if int(label) >= NUM_CLASSES:
            raise UserError(f"{path}, line {number}: label {label} is out of range 0..{NUM_CLASSES - 1}")
        samples.append((name, int(label)))
    if not samples:
        raise UserError(f"{path} lists no images")
    return tuple(samples)


def class_names(root: Path) -> tuple[str, ...]:
    """Class names by official label, collected from all lists in the folder; ``class_<label>`` if no list has the class."""
    names = [f"class_{label}" for label in range(NUM_CLASSES)]
    lists = {f"{domain}_{split}" for domain in DOMAINS for split in ("train", "test")}
    for path in sorted(lists_folder(root).glob("*_t*.txt")):
        if path.stem in lists:
            for sample, label in read_list(path):
                names[label] = sample.split("/")[1]
    return tuple(names)


def read_domain(root: Path, domain: str, stretch: bool = False) -> TaskData:
    """One domain with its official split and all 345 labels; ``stretch``: images are resized to a square, not cropped.

    Raises:
        UserError: for a damaged list, or if none of the listed images exists.
    """
    folder = lists_folder(root)
    splits = {split: read_list(folder / f"{domain}_{split}.txt") for split in ("train", "test")}
    if not any((root / name).exists() for name, _ in splits["train"][:50]):
        raise UserError(
            f"the images of {domain} are not under {root} (no {root / splits['train'][0][0]}); "
            f"unpack {domain}.zip there so that {root / domain}/<class>/ exists"
        )
    names = class_names(root)
    found = {split: {names[label] for _, label in samples} for split, samples in splits.items()}
    paths = {split: tuple((str(root / name), label) for name, label in samples) for split, samples in splits.items()}
    notes = missing_notes(names, found)
    return TaskData(name=domain, classes=names, **paths, notes=notes, stretch=stretch, is_listed=True)


def official_order(names: Iterable[str]) -> list[str]:
    """Class names in the order of the official labels: alphabetical, ignoring case and punctuation."""
    return sorted(names, key=lambda name: (re.sub(r"[^a-z0-9]", "", name.lower()), name))


def missing_notes(classes: Iterable[str], found: Mapping[str, set[str]]) -> tuple[str, ...]:
    """A note for each split that lacks classes."""
    notes = []
    for split, present in found.items():
        missing = [name for name in classes if name not in present]
        if missing:
            notes.append(f"{split} has no image of {first_three(missing)}; the label stays reserved")
    return tuple(notes)


def first_three(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
