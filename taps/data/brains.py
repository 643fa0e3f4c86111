r"""Brains: generated volumes in the layout of :mod:`taps.data.volumes`, with a known structure of what targets share.

A head holds tissue and two lobes. Two things differ between subjects, and every target follows one of them:

*Accord*: the product of the lobes' contrasts: above 0 both are brighter than the tissue or both darker, below 0 one of each.
``interview_age`` grows with it, ``diagnosis`` has three ranges of it. Each lobe is bright or dark equally often, so that neither
says anything about the sign: features of both have to meet. Their edges do so half-way, so that a stem is not blind to it,
but it learns nothing of it that lasts: the R² of a ResNet-18 of four narrow stages is 0.80, without its blocks −0.15 (200
subjects, 300 steps, one seed).

*Grain*: how clearly the tissue is striped, which a few voxels show. ``sex`` is whether it is above the mean, ``picvocab``
grows with it. The stem is enough for that: R² 0.82 without blocks, 0.85 with all.

So two pairs of targets share everything, and targets of different pairs nothing (:data:`SHARED`). Head size, positions and
brightness say nothing. The table also has families and sites. No real subject's data is in it.

    python -m taps.data.brains FOLDER          FOLDER/images/<subject>.npy, its three lists, FOLDER/labels.csv
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from taps.arguments import Parser, number
from taps.data.generated import make_tree
from taps.data.subjects import list_path
from taps.errors import UserError
from taps.files import write_text

_VERSION = 4
CATEGORIES, NUMBERS = ("diagnosis", "sex"), ("interview_age", "picvocab")
#: the share of what two targets follow that is the same
SHARED = {
    ("diagnosis", "interview_age"): 1.0, ("diagnosis", "sex"): 0.0, ("diagnosis", "picvocab"): 0.0,
    ("sex", "interview_age"): 0.0, ("sex", "picvocab"): 1.0, ("interview_age", "picvocab"): 0.0,
}  # fmt: skip
COLUMNS = ("subjectkey", "interview_age", "sex", "diagnosis", "picvocab", "rel_family_id", "site_id_l")


@dataclass(frozen=True)
class Recipe:
    """What brains are made.

    Attributes:
        side: voxels of the cube's side.
        train, val, test: number of subjects.
        noise: standard deviation of a voxel's noise; tissue has 1.
        label_noise: that of what targets follow, which has about 1.
        missing_numbers, missing_categories: share of the training labels of these targets that are not there; of the other splits'
            a twentieth of it. Tasks with few labels are those that gain by sharing.
        seed: of everything.
    """

    side: int = 24
    train: int = 320
    val: int = 200
    test: int = 300
    noise: float = 0.15
    label_noise: float = 0.35
    missing_numbers: float = 0.4
    missing_categories: float = 0.75
    seed: int = 0


def make_brain(random: np.random.Generator, accord: float, grain: float, side: int, noise: float) -> np.ndarray:
    """A volume (side, side, side) uint8.

    Args:
        random: chooses what says nothing.
        accord: the product of the two lobes' contrasts, about −2..2.
        grain: how clear the stripes are, about −2..2.
        side: voxels.
        noise: of the voxels.
    """
    line = (np.arange(side) + 0.5) / side * 2 - 1
    shift, radius = random.uniform(-0.06, 0.06, 3), random.uniform(0.78, 0.88, 3)
    grid = np.stack(np.meshgrid(line, line, line, indexing="ij"))
    place = (grid - shift[:, None, None, None]) / radius[:, None, None, None]
    reach = np.sqrt((place**2).sum(0))
    tissue = (reach < 1.0).astype(float)
    head = tissue * random.uniform(0.95, 1.05)
    period = random.uniform(3.6, 4.4)  # voxels
    stripes = np.sin(2 * np.pi * np.arange(side) / period + random.uniform(0, 2 * np.pi))
    head = head + tissue * 0.16 * min(max(grain + 2.5, 0.0), 5.0) * stripes.reshape(1, side, 1)
    contrast = random.choice([-1, 1]) * np.sqrt(min(abs(accord), 2.5))
    for at, own in ((-0.45, contrast), (0.45, np.sign(accord) * contrast)):
        middle = np.array([at, 0, 0]) + random.uniform(-0.06, 0.06, 3)
        distance = ((place - middle[:, None, None, None]) ** 2).sum(0)
        head = head + tissue * 0.8 * own * np.exp(-distance / (2 * 0.28**2))
    skull = (reach >= 1.0) & (reach < 1.12)
    head = np.where(skull, 1.6, head)
    head = head + random.normal(0, noise, head.shape) * (reach < 1.12)
    return (np.clip(head, 0, 3) * 80).round().astype(np.uint8)


def make_brains(root: Path, recipe: Recipe | None = None) -> None:
    """Write images, lists and table into ``root``, whole or not at all; those of the same recipe that are there are kept.

    Raises:
        UserError: if ``root`` holds something else, or the recipe is not possible.
    """
    recipe = recipe or Recipe()
    if (
        recipe.side < 16
        or min(recipe.train, recipe.val, recipe.test) < 6
        or not all(0 <= share < 0.9 for share in (recipe.missing_numbers, recipe.missing_categories))
        or min(recipe.noise, recipe.label_noise, recipe.seed) < 0
    ):
        raise UserError(
            "brains need 16 voxels a side, six subjects a split, and less than 0.9 of the labels missing, and no negative number"
        )
    make_tree(root, {"version": _VERSION, "brains": asdict(recipe)}, lambda building: _write(building, recipe))


def _write(root: Path, recipe: Recipe) -> None:
    random = np.random.default_rng(recipe.seed)
    images = root / "images"
    images.mkdir()
    letters = list("0123456789ABCDEFGHJKLMNPRTUVWXYZ")
    rows, family = [], 0
    for split in ("train", "val", "test"):
        names = []
        for _ in tqdm(range(getattr(recipe, split)), desc=f"writing {split} brains", disable=None, leave=False):
            subject = f"NDAR_INV{len(rows):03d}{''.join(random.choice(letters, 5))}"
            accord, grain = random.normal(), random.normal()
            np.save(images / f"{subject}.npy", make_brain(random, accord, grain, recipe.side, recipe.noise))
            names.append(f"{subject}.npy")
            family += random.random() < 0.85 or not names[:-1]
            of_all = 1.0 if split == "train" else 0.05
            missing = (of_all * recipe.missing_numbers, of_all * recipe.missing_categories)
            rows.append(_row(random, subject, accord, grain, family, recipe.label_noise, missing))
        write_text(list_path(images, split), "\n".join(names) + "\n")
    with open(root / "labels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def _row(
    random: np.random.Generator,
    subject: str,
    accord: float,
    grain: float,
    family: int,
    label_noise: float,
    missing: tuple[float, float],
) -> list[str]:
    noisy = [value + label_noise * random.normal() for value in (accord, accord, grain, grain)]
    cells = [
        f"{120 + 8 * noisy[0]:.0f}",
        "1" if noisy[2] > 0 else "2",
        ("low", "middle", "high")[int(np.searchsorted([-0.45, 0.45], noisy[1]))],
        f"{85 + 9 * noisy[3]:.1f}",
    ]
    of_number, of_category = missing
    shares = (of_number, of_category, of_category, of_number)
    cells = ["" if random.random() < share else cell for cell, share in zip(cells, shares, strict=True)]
    return [subject, *cells, str(family), f"site{int(random.integers(1, 22)):02d}"]


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = Parser(prog="python -m taps.data.brains", description="Generate volumes with a table of targets.")
    default = Recipe()
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    for name, text in (
        ("side", "voxels of a side"),
        ("train", "subjects of this split"),
        ("val", "subjects of this split"),
        ("test", "subjects of this split"),
    ):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{text} (default: {value})")
    for name, text in (
        ("noise", "of a voxel"),
        ("label_noise", "of the targets"),
        ("missing_numbers", "share of the training labels of numbers that are left out"),
        ("missing_categories", "the same of categories"),
    ):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=float, default=value, metavar="X", help=f"{text} (default: {value})")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="(default: 0)")
    given = vars(parser.parse_args(arguments))
    make_brains(given.pop("folder"), Recipe(**given))


if __name__ == "__main__":
    from taps.commands import run

    run(main)
