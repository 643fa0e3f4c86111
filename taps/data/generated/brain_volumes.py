r"""Brains: generated volumes in the layout of :mod:`taps.data.records.volumes`, with known similarity between tasks.

A head contains tissue and two lobes. Every target follows one of two factors, which vary between subjects:

*Accord* is the product of the lobes' contrasts: it is positive if both lobes are brighter or both darker than the tissue, and
negative otherwise. ``interview_age`` grows with it, and ``diagnosis`` divides it into three ranges. Each lobe is bright or dark
with equal probability, so that a single lobe does not tell the sign and features of both have to be combined. The stem sees
a little of it where the lobes' edges meet half-way, but learns nothing that generalises: the R² of a ResNet-18 with four
narrow stages is 0.80, without its blocks −0.15 (200 subjects, 300 steps, one seed).

*Grain* is the contrast of stripes in the tissue, which a few voxels show. ``sex`` tells whether it is above the mean, and
``picvocab`` grows with it. The stem suffices for it: R² is 0.82 without blocks and 0.85 with all.

Targets of the same factor share everything, targets of different factors nothing. Head size, positions and
brightness carry no information. The table also has families and sites. No data of real subjects is used.

    taps data brains FOLDER          FOLDER/images/<subject>.npy, three lists, FOLDER/labels.csv
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from taps.data.generated.tree import make_tree
from taps.data.multi_label import SPLITS
from taps.data.records.subjects import list_path
from taps.settings.data import BrainRecipe
from taps.settings.declare import as_dict, check_values
from taps.storage.files import csv_text, write_text

_VERSION = 4
CATEGORIES, NUMBERS = ("diagnosis", "sex"), ("interview_age", "picvocab")
COLUMNS = ("subjectkey", "interview_age", "sex", "diagnosis", "picvocab", "rel_family_id", "site_id_l")


def make_brain(random: np.random.Generator, accord: float, grain: float, side: int, noise: float) -> np.ndarray:
    """A volume (side, side, side) uint8.

    Args:
        random: source of head size, positions, brightness and noise.
        accord: product of the two lobes' contrasts, about −2..2.
        grain: contrast of the stripes, about −2..2.
        side: side of the cube in voxels.
        noise: standard deviation of the noise of a voxel.
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
    head = np.where((reach >= 1.0) & (reach < 1.12), 1.6, head)  # skull
    head = head + random.normal(0, noise, head.shape) * (reach < 1.12)
    return (np.clip(head, 0, 3) * 80).round().astype(np.uint8)


def make_brains(root: Path, recipe: BrainRecipe | None = None) -> None:
    """Write images, lists and the table into ``root``, completely or not at all; data of the same recipe is kept.

    Raises:
        UserError: if ``root`` holds other data, or for an invalid recipe.
    """
    recipe = recipe or BrainRecipe()
    check_values(recipe)
    about = {"version": _VERSION, "brains": as_dict(recipe, BrainRecipe)}
    make_tree(root, about, lambda building: _write(building, recipe))


def _write(root: Path, recipe: BrainRecipe) -> None:
    random = np.random.default_rng(recipe.seed)
    images = root / "images"
    images.mkdir()
    letters = list("0123456789ABCDEFGHJKLMNPRTUVWXYZ")
    rows, family = [], 0
    for split in SPLITS:
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
    write_text(root / "labels.csv", csv_text([COLUMNS, *rows]))


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
    of_number, of_category = missing
    cells = [
        (f"{120 + 8 * noisy[0]:.0f}", of_number),
        ("1" if noisy[2] > 0 else "2", of_category),
        (("low", "middle", "high")[int(np.searchsorted([-0.45, 0.45], noisy[1]))], of_category),
        (f"{85 + 9 * noisy[3]:.1f}", of_number),
    ]
    known = ["" if random.random() < share else cell for cell, share in cells]
    return [subject, *known, str(family), f"site{int(random.integers(1, 22)):02d}"]
