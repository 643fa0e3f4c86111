r"""Stays: generated hospital stays in mimic3-benchmarks' multitask layout, with known similarity between tasks.

Every task asks about one or both of two properties of a patient:

*Complaints*: a patient has some of six. Each shifts one vital sign against the others during the whole stay, so that a single
hour shows it. ``pheno`` asks for the complaints, ``ihm`` for the severe one.

*The turn*: towards the end of a stay all vital signs drift together, faster and faster. Because patients' baselines differ,
only long intervals show it. ``los`` asks for the remaining time. ``decomp`` asks whether the end is near, for patients who die.

So ``ihm`` and ``pheno`` share everything, ``los`` has nothing in common with either, and ``decomp`` shares half with each
(``benchmarks/sharing.py`` measures it). No data of real patients is used. ``taps data stays FOLDER`` writes a data set.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from taps.data.generated.tree import make_tree
from taps.data.multi_label import SPLITS
from taps.data.records.mimic3 import fit_normalizer
from taps.data.records.mimic3_lists import PHENOTYPES, folder_of
from taps.settings.data import StayRecipe
from taps.settings.declare import as_dict, check_values
from taps.storage.files import csv_text, write_json, write_text

_VERSION = 3
#: the Glasgow coma scale, from the worst to the best answer, in the two spellings of the hospitals' records
_EYES = (
    ("1 No Response", "2 To pain", "3 To speech", "4 Spontaneously"),
    ("None", "To Pain", "To Speech", "Spontaneously"),
)
_MOTORS = (
    (
        "1 No Response",
        "2 Abnorm extensn",
        "3 Abnorm flexion",
        "4 Flex-withdraws",
        "5 Localizes Pain",
        "6 Obeys Commands",
    ),
    ("No response", "Abnormal extension", "Abnormal Flexion", "Flex-withdraws", "Localizes Pain", "Obeys Commands"),
)
_VERBALS = (
    ("1 No Response", "2 Incomp sounds", "3 Inapprop words", "4 Confused", "5 Oriented"),
    ("No Response", "Incomprehensible sounds", "Inappropriate Words", "Confused", "Oriented"),
)
#: channel -> normal value as text, and its categories if it is categorical
_CHANNELS: dict[str, tuple[str, list[str]]] = {
    "Capillary refill rate": ("0.0", ["0.0", "1.0"]),
    "Diastolic blood pressure": ("59.0", []),
    "Fraction inspired oxygen": ("0.21", []),
    "Glascow coma scale eye opening": ("4 Spontaneously", sorted({*_EYES[0], *_EYES[1]})),
    "Glascow coma scale motor response": ("6 Obeys Commands", sorted({*_MOTORS[0], *_MOTORS[1]})),
    "Glascow coma scale total": ("15", [str(value) for value in range(3, 16)]),
    "Glascow coma scale verbal response": (
        "5 Oriented", sorted({*_VERBALS[0], *_VERBALS[1], "1.0 ET/Trach", "No Response-ETT"}),
    ),
    "Glucose": ("128.0", []),
    "Heart Rate": ("86", []),
    "Height": ("170.0", []),
    "Mean blood pressure": ("77.0", []),
    "Oxygen saturation": ("98.0", []),
    "Respiratory rate": ("19", []),
    "Systolic blood pressure": ("118.0", []),
    "Temperature": ("36.6", []),
    "Weight": ("81.0", []),
    "pH": ("7.4", []),
}  # fmt: skip
#: vital signs: mean, spread between patients, and direction of the turn
_VITALS = {
    "Heart Rate": (86.0, 14.0, 1.0),
    "Mean blood pressure": (77.0, 11.0, -1.0),
    "Respiratory rate": (19.0, 4.0, 1.0),
    "Systolic blood pressure": (118.0, 17.0, -1.0),
    "Diastolic blood pressure": (60.0, 10.0, -1.0),
    "Temperature": (37.0, 0.6, 1.0),
}
#: share of hours in which a channel is measured
_MEASURED = {"Glucose": 0.25, "pH": 0.15, "Oxygen saturation": 0.9, "Fraction inspired oxygen": 0.1,
             "Capillary refill rate": 0.05}  # fmt: skip
_LISTS = "filename,length of stay,in-hospital mortality task (pos;mask;label),length of stay task (masks;labels)," \
    "phenotyping task (labels),decompensation task (masks;labels)"  # fmt: skip


def make_stay(random: np.random.Generator, noise: float) -> tuple[list[list[str]], dict]:
    """One stay: the rows of its time series and its labels.

    Returns:
        Rows [hour, 17 cells], and a dict of ``hours``, ``lived`` (hours), ``died``, ``phenotypes`` and ``first``, the hour of
        the first row.
    """
    complaints = random.random(len(_VITALS)) < 0.35
    died = bool(complaints[0]) != (random.random() < 0.04)
    hours = float(min(30.0 + random.exponential(45.0), 160.0))
    count = int(hours) + 1
    times = np.arange(count) + random.uniform(0.05, 0.95, count)
    times = times[times < hours]
    turn = 2.5 * np.exp((times - hours) / 30.0)
    wander = np.cumsum(random.normal(0, 0.04, len(times)))
    common = random.normal() + turn + wander - wander.mean()
    vitals = {}
    for index, (name, (mean, spread, direction)) in enumerate(_VITALS.items()):
        own = 2.4 * complaints[index] + random.normal(0, noise, len(times))
        vitals[name] = mean + spread * direction * (common + own)
    rows = _rows(random, times, vitals, common)
    has = complaints[np.arange(PHENOTYPES) % len(_VITALS)]
    phenotypes = np.where(random.random(PHENOTYPES) < 0.12, random.random(PHENOTYPES) < 0.5, has).astype(int)
    # some records go on for an hour after death, in which decompensation is not asked
    lived = hours - (1.0 if died and random.random() < 0.3 else 0.0)
    return rows, {"lived": lived, "hours": hours, "died": died, "phenotypes": phenotypes, "first": float(times[0])}


def _rows(random: np.random.Generator, times: np.ndarray, vitals: dict, common: np.ndarray) -> list[list[str]]:
    steady = {
        "Glucose": 128 + 25 * random.normal() + random.normal(0, 12, len(times)),
        "pH": 7.4 + random.normal(0, 0.04, len(times)),
        "Oxygen saturation": np.clip(97 + random.normal(0, 1.2, len(times)), 60, 100),
        "Fraction inspired oxygen": np.full(len(times), random.choice([0.21, 0.4, 0.5])),
        "Capillary refill rate": (random.random(len(times)) < 0.1).astype(float),
    }
    size, weight = 170 + 10 * random.normal(), 80 + 15 * random.normal()
    style = int(random.integers(0, 2))  # spelling of the coma scale
    rows = []
    for index, time in enumerate(times):
        cells = dict.fromkeys(_CHANNELS, "")
        for name, values in vitals.items():
            if random.random() < 0.92:
                cells[name] = f"{values[index]:.1f}"
        for name, values in steady.items():
            if random.random() < _MEASURED[name]:
                cells[name] = f"{values[index]:.2f}" if name != "Capillary refill rate" else f"{values[index]:.1f}"
        if index == 0:
            cells["Height"], cells["Weight"] = f"{size:.1f}", f"{weight:.1f}"
        if random.random() < 0.25:
            cells.update(_scale(int(np.clip(round(13 - common[index] + random.normal(0, 1)), 3, 15)), style))
        if not any(cells.values()):
            cells["Heart Rate"] = f"{vitals['Heart Rate'][index]:.1f}"
        rows.append([repr(float(time)), *cells.values()])
    return rows


def _scale(total: int, style: int) -> dict[str, str]:
    """The categories of the Glasgow coma scale for a total of about ``total``."""
    eye = int(np.clip(round(total * 4 / 15), 1, 4))
    motor = int(np.clip(round(total * 6 / 15), 1, 6))
    verbal = int(np.clip(total - eye - motor, 1, 5))
    return {
        "Glascow coma scale eye opening": _EYES[style][eye - 1],
        "Glascow coma scale motor response": _MOTORS[style][motor - 1],
        "Glascow coma scale verbal response": _VERBALS[style][verbal - 1],
        "Glascow coma scale total": str(eye + motor + verbal),
    }


def list_row(name: str, answers: dict) -> str:
    """The row of a list file, by the benchmark's rules of which hours are asked about."""
    hours, died, first = answers["hours"], answers["died"], answers["first"]
    asked = int(hours >= 48 and first <= 48)
    steps = np.arange(int(hours) + 1)
    masks = ((steps > 4) & (steps > first)).astype(int)
    remaining = ";".join([*map(str, masks), *(f"{hours - step:.6f}" for step in steps)])
    alive = np.arange(int(answers["lived"]) + 1)
    soon = (died & (answers["lived"] - alive < 24)).astype(int)
    decompensation = ";".join([*map(str, masks[: len(alive)]), *map(str, soon)])
    mortality = f"{47 * asked};{asked};{int(died)}"
    phenotypes = ";".join(map(str, answers["phenotypes"]))
    return ",".join([name, f"{hours:.6f}", mortality, remaining, phenotypes, decompensation])


def make_stays(root: Path, recipe: StayRecipe | None = None) -> None:
    """Write the stays into ``root``, completely or not at all; data of the same recipe is kept.

    Raises:
        UserError: if ``root`` holds other data, or for an invalid recipe.
    """
    recipe = recipe or StayRecipe()
    check_values(recipe)
    about = {"version": _VERSION, "stays": as_dict(recipe, StayRecipe)}
    make_tree(root, about, lambda building: _write(building, recipe))


def _write(root: Path, recipe: StayRecipe) -> None:
    random = np.random.default_rng(recipe.seed)
    for folder in ("train", "test"):
        (root / folder).mkdir()
    patient = 10000
    for split in SPLITS:
        lines, episode = [_LISTS], 1
        for _ in tqdm(range(getattr(recipe, split)), desc=f"writing {split} stays", disable=None, leave=False):
            episode = 2 if lines[1:] and episode == 1 and random.random() < 0.2 else 1
            patient += episode == 1
            rows, answers = make_stay(random, recipe.noise)
            name = f"{patient}_episode{episode}_timeseries.csv"
            write_text(root / folder_of(split) / name, csv_text([["Hours", *_CHANNELS], *rows]))
            lines.append(list_row(name, answers))
        write_text(root / f"{split}_listfile.csv", "\n".join(lines) + "\n")
    config = {
        "id_to_channel": list(_CHANNELS),
        "is_categorical_channel": {name: bool(values) for name, (_, values) in _CHANNELS.items()},
        "possible_values": {name: values for name, (_, values) in _CHANNELS.items()},
        "normal_values": {name: normal for name, (normal, _) in _CHANNELS.items()},
    }
    write_json(root / "discretizer_config.json", config)
    fit_normalizer(root)
