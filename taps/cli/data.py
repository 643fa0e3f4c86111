"""``taps data ACTION``: check downloaded data, generate data, divide subjects, fit a normaliser."""

from __future__ import annotations

import sys
from pathlib import Path

from taps.data import checks
from taps.data.generated.brain_volumes import make_brains
from taps.data.generated.hospital_stays import make_stays
from taps.data.generated.scenes import make_scenes
from taps.data.multi_label import SPLITS
from taps.data.records.mimic3 import fit_normalizer
from taps.data.records.mimic3_lists import find_root
from taps.data.records.subjects import divide, list_path, read_table, subject_of
from taps.errors import UserError
from taps.settings.data import (
    BrainsSettings,
    CheckSettings,
    NormalizerSettings,
    ScenesSettings,
    StaysSettings,
    SubjectsSettings,
)
from taps.storage.files import write_text


def check(settings: CheckSettings) -> None:
    """Compare folders with complete copies; ends with status 1 if something is missing or different."""
    wrong = 0
    for folder in settings.folders:
        lines, bad = checks.check(Path(folder))
        print("\n".join(lines))
        wrong += bad
    print("nothing is missing" if wrong == 0 else f"missing or different: {wrong}")
    sys.exit(wrong > 0)


def scenes(settings: ScenesSettings) -> None:
    """Generate scenes."""
    make_scenes(Path(settings.folder), settings)


def stays(settings: StaysSettings) -> None:
    """Generate hospital stays."""
    make_stays(Path(settings.folder), settings)


def brains(settings: BrainsSettings) -> None:
    """Generate volumes."""
    make_brains(Path(settings.folder), settings)


def normalizer(settings: NormalizerSettings) -> None:
    """Fit a normaliser and print where it is."""
    there = find_root(Path(settings.root)) / "normalizer.json"
    if there.exists() and not settings.overwrite:
        raise UserError(f"{there} exists; replace it with --overwrite")
    print(fit_normalizer(Path(settings.root)))


def subjects(settings: SubjectsSettings) -> None:
    """Divide subjects, write the three lists and print their lengths."""
    images, labels = Path(settings.images), Path(settings.labels)
    if settings.val_size + settings.test_size >= 1:
        raise UserError("--val_size and --test_size leave nothing for train")
    if not images.is_dir():
        raise UserError(f"{images} does not exist")
    there = [path for path in (list_path(images, split) for split in SPLITS) if path.exists()]
    if there and not settings.overwrite:
        raise UserError(f"{there[0]} exists; replace the lists with --overwrite")
    table = read_table(labels, settings.subject_column)
    names = sorted(path.name for path in images.iterdir() if not path.name.startswith("."))
    files = {subject_of(name): name for name in names if subject_of(name)}
    known = [subject for subject in files if subject in table.rows]
    if not known:
        raise UserError(f"no volume in {images} has a row in {labels}")
    sizes = (settings.val_size, settings.test_size)
    parts = divide(table, known, *sizes, settings.seed, settings.stratify, settings.group)
    for split, own in parts.items():
        write_text(list_path(images, split), "".join(f"{files[subject]}\n" for subject in own))
    left_out = len(files) - len(known)
    without = f"; {left_out} volumes have no row in {labels.name}" if left_out else ""
    print(f"{', '.join(f'{len(own)} {split}' for split, own in parts.items())}{without}")
