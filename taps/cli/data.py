"""``taps data ACTION``: check downloaded data, generate data, divide subjects, fit a normaliser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path

from taps.cli.parser import number
from taps.settings.declare import Parser
from taps.settings.published_files import places_of_subjects


def main(arguments: Sequence[str]) -> None:
    parser = Parser(prog="taps data", description="Check downloaded data, or generate some.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    for name, (add, _, text) in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name in arguments[:1]:  # avoids imports for the other actions
            add(action)
            action.accept_config(places_of_subjects if name == "subjects" else None)
    given = parser.parse_args(arguments)
    ACTIONS[given.action][1](given, parser)


def _add_check(parser: Parser) -> None:
    parser.add_argument("folders", nargs="+", metavar="FOLDER")


def _check(given: argparse.Namespace, parser: Parser) -> None:
    from taps.data.checks import check

    wrong = 0
    for folder in given.folders:
        lines, bad = check(Path(folder))
        print("\n".join(lines))
        wrong += bad
    print("nothing is missing" if wrong == 0 else f"missing or different: {wrong}")
    sys.exit(wrong > 0)


#: help texts of the generators' numeric options
_NUMBERS = {
    "train": "samples of this split",
    "val": "samples of this split",
    "test": "samples of this split",
    "side": "voxels per side",
    "difficulty": "0 to 1",
    "noise": "noise of a measurement or a voxel",
    "label_noise": "noise of the targets",
    "missing_numbers": "share of missing training labels of numbers",
    "missing_categories": "share of missing training labels of categories",
}


def _generator(module: str, recipe: str, make: str) -> tuple[Callable, Callable]:
    """Return the two functions of an action that generates a data set, with the fields of ``recipe`` as options."""

    def add(parser: Parser) -> None:
        parser.add_argument("folder", metavar="FOLDER", type=Path)
        own = import_module(f"taps.data.generated.{module}")
        for field in fields(getattr(own, recipe)):
            default, option = field.default, f"--{field.name}"
            if field.name == "size":
                text = f"in pixels (default: {' '.join(map(str, default))})"
                parser.add_argument(option, type=int, nargs=2, default=default, metavar=("HEIGHT", "WIDTH"), help=text)
            elif field.name == "seed":
                parser.add_argument(option, type=number(int, 0), default=default, metavar="N", help="(default: 0)")
            else:
                text, mark = f"{_NUMBERS[field.name]} (default: {default})", "N" if type(default) is int else "X"
                parser.add_argument(option, type=type(default), default=default, metavar=mark, help=text)

    def generate(given: argparse.Namespace, parser: Parser) -> None:
        own = import_module(f"taps.data.generated.{module}")
        values = {field.name: getattr(given, field.name) for field in fields(getattr(own, recipe))}
        if "size" in values:
            values["size"] = tuple(values["size"])
        getattr(own, make)(given.folder, getattr(own, recipe)(**values))

    return add, generate


def _add_normalizer(parser: Parser) -> None:
    parser.add_argument("root", type=Path, help="the folder with the lists")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing normaliser")


def _normalizer(given: argparse.Namespace, parser: Parser) -> None:
    from taps.data.records.mimic3 import fit_normalizer
    from taps.data.records.mimic3_lists import find_root

    there = find_root(given.root) / "normalizer.json"
    if there.exists() and not given.overwrite:
        parser.error(f"{there} exists; replace it with --overwrite")
    print(fit_normalizer(given.root))


def _add_subjects(parser: Parser) -> None:
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder with the volumes")
    parser.add_argument("--labels", type=Path, required=True, metavar="CSV", help="table with one row per subject")
    parser.add_argument("--subject_column", default="subjectkey", metavar="NAME", help="(default: subjectkey)")
    columns = {"nargs": "+", "default": [], "metavar": "COLUMN"}
    parser.add_argument("--stratify", **columns, help="columns whose values are distributed evenly over the lists")
    parser.add_argument("--group", **columns, help="columns; subjects with an equal value stay in one list")
    parser.add_argument("--val_size", type=float, default=0.1, metavar="F", help="share, steps of 1/50 (default: 0.1)")
    parser.add_argument("--test_size", type=float, default=0.1, metavar="F", help="share (default: 0.1)")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="seed of the shuffle (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing lists")


def _subjects(given: argparse.Namespace, parser: Parser) -> None:
    from taps.data.multi_label import SPLITS
    from taps.data.records.subjects import divide, list_path, read_table, subject_of
    from taps.storage.files import write_text

    if not (given.val_size > 0 and given.test_size > 0 and given.val_size + given.test_size < 1):
        parser.error("--val_size and --test_size must be above 0 and leave something for train")
    if not given.images.is_dir():
        parser.error(f"{given.images} does not exist")
    there = [path for path in (list_path(given.images, split) for split in SPLITS) if path.exists()]
    if there and not given.overwrite:
        parser.error(f"{there[0]} exists; replace the lists with --overwrite")
    table = read_table(given.labels, given.subject_column)
    names = sorted(path.name for path in given.images.iterdir() if not path.name.startswith("."))
    files = {subject_of(name): name for name in names if subject_of(name)}
    subjects = [subject for subject in files if subject in table.rows]
    if not subjects:
        parser.error(f"no volume in {given.images} has a row in {given.labels}")
    parts = divide(table, subjects, given.val_size, given.test_size, given.seed, given.stratify, given.group)
    for split, own in parts.items():
        write_text(list_path(given.images, split), "".join(f"{files[subject]}\n" for subject in own))
    left_out = len(files) - len(subjects)
    without = f"; {left_out} volumes have no row in {given.labels.name}" if left_out else ""
    print(f"{', '.join(f'{len(own)} {split}' for split, own in parts.items())}{without}")


#: action -> function that adds its arguments, function that runs it, help text
ACTIONS = {
    "check": (_add_check, _check, "compare folders with the published counts; exit status 1: incomplete"),
    "scenes": (*_generator("scenes", "SceneRecipe", "make_scenes"), "generate the Scenes benchmark"),
    "stays": (
        *_generator("hospital_stays", "StayRecipe", "make_stays"),
        "generate hospital stays as mimic3-benchmarks lays them out",
    ),
    "brains": (*_generator("brain_volumes", "BrainRecipe", "make_brains"), "generate volumes with a table of targets"),
    "subjects": (_add_subjects, _subjects, "divide subjects into train, val and test"),
    "normalizer": (_add_normalizer, _normalizer, "fit the normaliser of a mimic3-benchmarks tree"),
}
