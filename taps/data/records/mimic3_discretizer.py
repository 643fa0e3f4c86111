"""Discretisation of hospital stays into hourly bins, as in mimic3-benchmarks (Harutyunyan et al., Scientific Data 2019).

An hourly bin has 59 values and 17 flags "measured in this hour". A missing measurement is replaced by the previous one, or by the
channel's normal value.
"""

from __future__ import annotations

import csv
import math
import zipfile
from pathlib import Path

import numpy as np

from taps.errors import UserError
from taps.storage.files import read_json

_EPSILON = 1e-6  # hours; a measurement exactly on the hour belongs to the previous bin, as in the benchmark


def bin_count(hours: float) -> int:
    """Number of hourly bins in a stay."""
    return int(hours + 1.0 - _EPSILON)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


class Discretizer:
    """Converts time series of measurements to hourly bins.

    Args:
        path: ``discretizer_config.json`` with ``id_to_channel``, ``is_categorical_channel``, ``possible_values`` and
            ``normal_values``.

    Raises:
        UserError: if the file is missing or incomplete.
    """

    def __init__(self, path: Path) -> None:
        config = read_json(path)
        try:
            self.channels = [str(name) for name in config["id_to_channel"]]
            self.values = {
                name: {str(value): index for index, value in enumerate(config["possible_values"][name])}
                if config["is_categorical_channel"][name]
                else None
                for name in self.channels
            }
            self.normal = [self.encode(name, str(config["normal_values"][name]), str(path)) for name in self.channels]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} lacks {error}; it should be mimic3-benchmarks' discretizer_config.json") from None
        self._parsers = [_finite if own is None else own.__getitem__ for own in self.values.values()]
        self.widths = [1 if own is None else len(own) for own in self.values.values()]
        names = [[name] if own is None else [f"{name}->{value}" for value in own] for name, own in self.values.items()]
        self.header = [name for own in names for name in own] + [f"mask->{name}" for name in self.channels]
        self.continuous = [index for index, name in enumerate(self.header) if "->" not in name]

    def encode(self, channel: str, text: str, where: str) -> float:
        """A cell as a number: the measurement, or the index of a category."""
        known = self.values[channel]
        if known is not None:
            if text not in known:
                raise UserError(f"{where}: {text!r} is not a value of {channel}; known are {', '.join(known)}")
            return float(known[text])
        try:
            return _finite(text)
        except ValueError:
            raise UserError(f"{where}: {channel} is {text!r}, not a number") from None

    def read(self, path: Path, hours: float) -> tuple[np.ndarray, np.ndarray]:
        """The bins of a stay.

        Args:
            path: the time series.
            hours: length of the stay; later measurements are ignored, as in the benchmark.

        Returns:
            Values (T, channels) float32, with categories as indices, and whether each was measured (T, channels) bool.

        Raises:
            UserError: with file and row, for a missing or unknown column, an unknown category, a value that is not a number,
                or hours that are not in order.
        """
        count = bin_count(hours)
        values = np.zeros((count, len(self.channels)), np.float32)
        measured = np.zeros((count, len(self.channels)), bool)
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = csv.reader(file)
                columns = self._columns(path, next(rows, []))
                before = -math.inf
                for number, row in enumerate(rows, 2):
                    hour = self._hour(path, number, row, len(columns), before)
                    before = hour
                    if hour > hours + _EPSILON:
                        continue
                    bin_index = int(hour - _EPSILON)
                    for column, text in zip(columns, row[1:], strict=True):
                        if text:
                            try:
                                values[bin_index, column] = self._parsers[column](text)
                            except (KeyError, ValueError):
                                self.encode(self.channels[column], text, f"{path} row {number}")  # raises the error
                            measured[bin_index, column] = True
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        # for each bin the index of the last bin with a measurement
        last = np.maximum.accumulate(np.where(measured, np.arange(count)[:, None], -1), 0)
        filled = np.take_along_axis(values, np.maximum(last, 0), 0)
        return np.where(last < 0, np.asarray(self.normal, np.float32), filled), measured

    def _columns(self, path: Path, header: list[str]) -> list[int]:
        if not header or header[0] != "Hours":
            raise UserError(f"{path}: the first column must be 'Hours', not {header[0] if header else 'nothing'!r}")
        missing = [name for name in self.channels if name not in header]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}")
        twice = [name for name in header if header.count(name) > 1]
        if twice:
            raise UserError(f"{path} has the column {twice[0]!r} twice")
        extra = [name for name in header[1:] if name not in self.channels]
        if extra:
            raise UserError(f"{path} has a column {extra[0]!r}, which discretizer_config.json does not know")
        return [self.channels.index(name) for name in header[1:]]

    def _hour(self, path: Path, number: int, row: list[str], columns: int, before: float) -> float:
        if len(row) != columns + 1:
            raise UserError(f"{path} row {number} has {len(row)} cells instead of {columns + 1}")
        try:
            hour = float(row[0])
        except ValueError:
            hour = math.nan
        if not hour > -_EPSILON:
            raise UserError(f"{path} row {number}: {row[0]!r} is not an hour of a stay")
        if hour < before - _EPSILON:
            raise UserError(f"{path} row {number}: hour {row[0]} comes after hour {before:g}")
        return hour

    def expand(self, values: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """Bins as network inputs (T, 76) float32: one-hot categories, flags at the end."""
        parts = [
            own[:, None] if known is None else own[:, None] == np.arange(len(known))
            for own, known in zip(values.T, self.values.values(), strict=True)
        ]
        return np.concatenate([*parts, measured], 1, dtype=np.float32)


def read_normalizer(path: Path, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of all columns, from ``means`` and ``stds`` in a ``.json`` or ``.npz`` file.

    Raises:
        UserError: if the file is missing, may be a pickle, or has another number of columns.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix not in (".json", ".npz"):
        raise UserError(
            f"{path} may be a pickle, and nothing is unpickled: fit a normaliser with taps data normalizer, or save its "
            "means and stds as .json or .npz"
        )
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                stored = dict(archive)
        else:
            stored = read_json(path)
        means, stds = np.asarray(stored["means"], float), np.asarray(stored["stds"], float)
    except (KeyError, ValueError, TypeError, zipfile.BadZipFile, OSError, EOFError) as error:
        reason = "" if isinstance(error, KeyError) else f": {error}"
        raise UserError(f"{path} does not hold numbers 'means' and 'stds'{reason}") from None
    if means.shape != (columns,) or stds.shape != (columns,) or not (np.isfinite(means).all() and (stds > 0).all()):
        raise UserError(
            f"{path} has means of shape {means.shape} and stds of shape {stds.shape}; {columns} each, above 0, are needed"
        )
    return means.astype(np.float32), stds.astype(np.float32)
