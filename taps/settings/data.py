"""Settings of ``taps data`` and recipes of generated data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from taps.settings.declare import FromFile, Settings, setting


@dataclass(frozen=True)
class SceneRecipe(Settings):
    """Recipe of generated scenes."""

    title: ClassVar[str] = "recipe"
    size: tuple[int, int] = setting((64, 64), "height and width in pixels", int, low=16, nargs=2, metavar=("HEIGHT", "WIDTH"))
    train: int = setting(480, "scenes for training", int, low=1, metavar="N")
    val: int = setting(80, "scenes for validation", int, low=1, metavar="N")
    test: int = setting(160, "scenes for testing", int, low=1, metavar="N")
    difficulty: float = setting(0.5, "number of objects and strength of textures, shadows and noise, 0 to 1", float, low=0, high=1, metavar="X")
    seed: int = setting(0, "seed of all random choices", int, low=0, metavar="N")


@dataclass(frozen=True)
class StayRecipe(Settings):
    """Recipe of generated stays; one patient in five has two."""

    title: ClassVar[str] = "recipe"
    train: int = setting(400, "stays for training", int, low=1, metavar="N")
    val: int = setting(160, "stays for validation", int, low=1, metavar="N")
    test: int = setting(400, "stays for testing", int, low=1, metavar="N")
    noise: float = setting(0.15, "standard deviation of a measurement's noise, relative to the spread between patients", float, low=0, high=10, metavar="X")
    seed: int = setting(0, "seed of all random choices", int, low=0, metavar="N")


@dataclass(frozen=True)
class BrainRecipe(Settings):
    """Recipe of generated volumes. Tasks with few labels gain most from sharing."""

    title: ClassVar[str] = "recipe"
    side: int = setting(24, "side of the cube in voxels", int, low=16, metavar="N")
    train: int = setting(320, "subjects for training", int, low=6, metavar="N")
    val: int = setting(200, "subjects for validation", int, low=6, metavar="N")
    test: int = setting(300, "subjects for testing", int, low=6, metavar="N")
    noise: float = setting(0.15, "standard deviation of a voxel's noise, in units of the tissue's brightness", float, low=0, metavar="X")
    label_noise: float = setting(0.35, "standard deviation of the noise of the targets' factors, which themselves have about 1", float, low=0, metavar="X")
    missing_numbers: float = setting(0.4, "share of missing training labels of numbers; in the other splits a twentieth of it", float, low=0, high=0.9, metavar="X")
    missing_categories: float = setting(0.75, "share of missing training labels of categories; in the other splits a twentieth of it", float, low=0, high=0.9, metavar="X")
    seed: int = setting(0, "seed of all random choices", int, low=0, metavar="N")


@dataclass(frozen=True)
class Target(Settings):
    """The folder of generated data."""

    title: ClassVar[str] = "output"
    positional: ClassVar[tuple[str, ...]] = ("folder",)
    required: ClassVar[tuple[str, ...]] = ("folder",)
    missing: ClassVar[str] = "name a folder for the data, e.g. datasets/generated"
    folder: str = setting("", "folder of the data; data of the same recipe is kept")


@dataclass(frozen=True)
class ScenesSettings(FromFile, SceneRecipe, Target):
    """Settings of ``taps data scenes``."""

    description: ClassVar[str] = "Generate the Scenes benchmark."


@dataclass(frozen=True)
class StaysSettings(FromFile, StayRecipe, Target):
    """Settings of ``taps data stays``."""

    description: ClassVar[str] = "Generate hospital stays as mimic3-benchmarks lays them out."


@dataclass(frozen=True)
class BrainsSettings(FromFile, BrainRecipe, Target):
    """Settings of ``taps data brains``."""

    description: ClassVar[str] = "Generate volumes with a table of targets."


@dataclass(frozen=True)
class CheckSettings(FromFile):
    """Settings of ``taps data check``."""

    title: ClassVar[str] = "data"
    description: ClassVar[str] = "Compare folders with the published counts."
    epilog: ClassVar[str] = "Exit status: 0 complete; 1 something is missing or different; 2 a mistake."
    positional: ClassVar[tuple[str, ...]] = ("folders",)
    required: ClassVar[tuple[str, ...]] = ("folders",)
    missing: ClassVar[str] = "name folders of data: taps data check datasets/DomainNet"
    folders: list[str] = setting([], "folders of data sets, each of which is read by its layout and its name", nargs="+", metavar="FOLDER")


@dataclass(frozen=True)
class SubjectsSettings(FromFile):
    """Settings of ``taps data subjects``."""

    title: ClassVar[str] = "subjects"
    description: ClassVar[str] = "Divide subjects into train, val and test."
    required: ClassVar[tuple[str, ...]] = ("images", "labels")
    missing: ClassVar[str] = "give the folder with the volumes and the table: --images DIR --labels CSV"
    images: str = setting("", "folder with the volumes", metavar="DIR")
    labels: str = setting("", "table with one row per subject", metavar="CSV")
    subject_column: str = setting("subjectkey", "the column that names the subjects", metavar="COLUMN")
    stratify: list[str] = setting([], "columns whose values are distributed evenly over the lists", nargs="+", metavar="COLUMN")
    group: list[str] = setting([], "columns; subjects with an equal value stay in one list", nargs="+", metavar="COLUMN")
    val_size: float = setting(0.1, "share of subjects for validation, in steps of 1/50", float, low=0, above=True, high=0.99, metavar="F")
    test_size: float = setting(0.1, "share of subjects for testing, in steps of 1/50", float, low=0, above=True, high=0.99, metavar="F")
    seed: int = setting(0, "seed of the shuffle", int, low=0, metavar="N")
    overwrite: bool = setting(False, "replace existing lists", bool)


@dataclass(frozen=True)
class NormalizerSettings(FromFile):
    """Settings of ``taps data normalizer``."""

    title: ClassVar[str] = "normalizer"
    description: ClassVar[str] = "Fit the normaliser of a mimic3-benchmarks tree."
    positional: ClassVar[tuple[str, ...]] = ("root",)
    required: ClassVar[tuple[str, ...]] = ("root",)
    missing: ClassVar[str] = "name the folder with the lists: taps data normalizer datasets/mimic3"
    root: str = setting("", "the folder with the lists")
    overwrite: bool = setting(False, "replace an existing normaliser", bool)
