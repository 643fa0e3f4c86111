"""Hospital stays in the layout of mimic3-benchmarks' multitask setting (Harutyunyan et al., Scientific Data 2019).

    train_listfile.csv, val_listfile.csv, test_listfile.csv      one row per stay (taps.data.records.mimic3_lists)
    train/<patient>_episode<n>_timeseries.csv                    hours and 17 channels, one cell per measurement
    test/…
    discretizer_config.json                                      the channels, their categories and normal values
    normalizer.json or .npz                                      means and stds of the 76 columns

Labels of all four tasks are per hour: mortality at hour 47, phenotypes at the last hour, the others at the hours of their
masks, NaN elsewhere. ``taps data normalizer ROOT`` fits the normaliser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from taps.data.multi_label import SPLITS, Cache, SharedData
from taps.data.reading import mistakes_of
from taps.data.records import mimic3_lists
from taps.data.records.mimic3_discretizer import Discretizer, read_normalizer
from taps.data.records.mimic3_lists import TASKS, Lists, Stay, find_root, folder_of, read_labels, read_list
from taps.errors import UserError, check_known
from taps.storage.files import write_json

_CACHE_BYTES = 1 << 29


@dataclass(frozen=True)
class StayData(SharedData):
    """The benchmark; a sample is a :class:`Stay`.

    Attributes:
        root: the folder with the lists.
        discretizer: discretizer of the time series.
        normalizer: means and standard deviations of all columns, applied to the continuous ones.
        crop: number of hours; longer stays are cut, shorter ones are padded with zeros.
        cache: time series that were read.
    """

    root: Path
    discretizer: Discretizer
    normalizer: tuple[np.ndarray, np.ndarray]
    crop: int = 170
    cache: Cache = field(default_factory=lambda: Cache(_CACHE_BYTES))

    def group(self, sample: Stay) -> str:
        return sample.name.split("_")[0]  # the patient

    def samples(self, split: str, train: bool, seed: int = 0) -> StaySet:
        return StaySet(self, split)

    def bins(self, stay: Stay) -> tuple[np.ndarray, np.ndarray]:
        return self.discretizer.read(self.root / folder_of(stay.split) / stay.name, stay.hours)

    def labels(self, stay: Stay) -> dict[str, np.ndarray]:
        path = self.root / f"{stay.split}_listfile.csv"
        with open(path, "rb") as file:
            file.seek(stay.offset)
            cells = file.readline().decode("utf-8", "replace").strip().split(",")
        if len(cells) != len(mimic3_lists.COLUMNS) or cells[0] != stay.name:
            raise UserError(f"{path} has changed since it was opened: row {stay.row} is not that of {stay.name}")
        return read_labels(path, stay.row, cells, self.crop)


class StaySet(Dataset):
    """(76, crop) inputs and {task: labels}; up to 512 MiB of time series over all processes are read from disk only once.

    Args:
        data: the benchmark with the chosen tasks.
        split: name of the split.
    """

    def __init__(self, data: StayData, split: str) -> None:
        self.data, self.stays = data, data.splits[split]

    def __len__(self) -> int:
        return len(self.stays)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        index = key[0] if isinstance(key, tuple) else key
        stay, crop = self.stays[index], self.data.crop

        def read() -> tuple[np.ndarray, np.ndarray]:
            values, measured = self.data.bins(stay)
            return values[:crop].copy(), measured[:crop].copy()

        x = self.data.discretizer.expand(*self.data.cache.get(stay[:2], read))
        columns, (means, stds) = self.data.discretizer.continuous, self.data.normalizer
        x[:, columns] = (x[:, columns] - means[columns]) / stds[columns]
        full = np.zeros((crop, x.shape[1]), np.float32)
        full[: len(x)] = x
        labels = self.data.labels(stay) if self.data.tasks else {}
        return torch.from_numpy(full.T.copy()), {name: torch.from_numpy(labels[name]) for name in self.data.tasks}


def open_mimic3(
    root: Path,
    crop: int = 170,
    normalizer: Path | None = None,
    positive_weights: Mapping[str, float] | None = None,
    names: Sequence[str] = tuple(TASKS),
    workers: int = 0,
) -> StayData:
    """Open the benchmark's folder. Lists are read as streams: only the position of a stay's row is kept.

    Args:
        root: folder with the lists, or with ``multitask/`` that has them.
        crop: hours kept of each stay.
        normalizer: file with means and stds; ``None``: ``normalizer.json`` or ``.npz`` in the root.
        positive_weights: by task, as in :class:`taps.data.multi_label.Task`.
        names: names of the tasks.
        workers: number of loader processes, which share the memory for cached time series.

    Raises:
        UserError: for an unknown task, a missing file, a wrong row (with file and row), or a split in which all labels of a
            binary task are equal.
    """
    check_known("task of benchmark mimic3", names, TASKS)
    root = find_root(root)
    config = root / "discretizer_config.json"
    if not config.is_file():
        raise UserError(f"{config} does not exist; copy it from mimic3-benchmarks (mimic3models/resources)")
    discretizer = Discretizer(config)
    path = normalizer or next((p for p in (root / "normalizer.json", root / "normalizer.npz") if p.is_file()), None)
    if path is None:
        raise UserError(f"{root} has no normalizer.json; fit it with: taps data normalizer {root}")
    found = Lists()
    splits = {split: read_list(root, split, crop, found) for split in SPLITS}
    mimic3_lists.check_disjoint(splits)
    notes = list(mimic3_lists.one_answer(found, splits, names))
    if found.empty:
        notes.append(f"{len(found.empty)} empty stays are left out, e.g. {found.empty[0]}")
    if found.short:
        notes.append(f"{len(found.short)} stays are shorter than an hour and left out, e.g. {found.short[0]}")
    if found.long:
        notes.append(
            f"{found.long} stays are longer than {crop} hours; {found.beyond} labels of later hours are left out, and their "
            f"phenotypes are asked at hour {crop - 1}"
        )
    weights, binary = positive_weights or {}, [name for name, task in TASKS.items() if task.kind == "binary"]
    check_known("yes-or-no task in positive weights", weights, binary)
    tasks = {name: replace(TASKS[name], positive_weight=weights.get(name, 1.0)) for name in dict.fromkeys(names)}
    scale, cache = read_normalizer(path, len(discretizer.header)), Cache(_CACHE_BYTES // max(workers, 1))
    return StayData("mimic3", tasks, splits, root, discretizer, scale, crop, cache, notes=tuple(notes))


def fit_normalizer(root: Path) -> Path:
    """Write ``normalizer.json``, the mean and standard deviation of every column over the hours of the training stays."""
    root = find_root(root)
    discretizer = Discretizer(root / "discretizer_config.json")
    stays = read_list(root, "train", 170, Lists())
    count, total, squares = 0, np.zeros(len(discretizer.header)), np.zeros(len(discretizer.header))
    for stay in tqdm(stays, desc="reading train", disable=None, leave=False):
        x = discretizer.expand(*discretizer.read(root / "train" / stay.name, stay.hours)).astype(np.float64)
        count, total, squares = count + len(x), total + x.sum(0), squares + (x**2).sum(0)
    means = total / count
    stds = np.sqrt(np.maximum(squares - count * means**2, 0.0) / max(count - 1, 1))
    write_json(root / "normalizer.json", {"means": means.tolist(), "stds": np.maximum(stds, 1e-7).tolist()})
    return root / "normalizer.json"


def check_stays(root: Path) -> tuple[list[str], int]:
    """Read every listed stay; returns the lines of a report and the number of mistakes."""
    root = find_root(root)
    mistakes, splits = [], {}
    discretizer = Discretizer(root / "discretizer_config.json")
    no_scale = (np.zeros(len(discretizer.header)), np.ones(len(discretizer.header)))
    for split in SPLITS:
        try:
            splits[split] = read_list(root, split, 170, Lists())
        except UserError as error:
            mistakes.append(f"  {error}")
    data = StayData("mimic3", TASKS, splits, root, discretizer, no_scale)
    for split, stays in splits.items():
        mistakes += mistakes_of(lambda stay: (data.bins(stay), data.labels(stay)), stays, f"reading {split}")
    try:
        mimic3_lists.check_disjoint(splits)
        open_mimic3(root)
    except UserError as error:
        if str(error) not in "".join(mistakes):
            mistakes.append(f"  {error}")
    counts = ", ".join(f"{len(stays)} {split}" for split, stays in splits.items())
    return [f"{root}: mimic3, {counts}", *mistakes], len(mistakes)
