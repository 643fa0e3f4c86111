"""Settings of ``taps import``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from taps.settings.declare import FromFile, setting

#: kinds of files that become tasks
SOURCES = ("taps", "adashare", "dynashare", "automtl", "efficient_mtl", "state_dict", "peft")
#: of these, programs with one network for several tasks of maps
MULTI_TASK_SOURCES = ("adashare", "dynashare", "automtl", "efficient_mtl")


@dataclass(frozen=True)
class ImportSettings(FromFile):
    """Settings of ``taps import``."""

    title: ClassVar[str] = "import"
    description: ClassVar[str] = "Turn fine-tuned networks, LoRA adapters of PEFT and checkpoints of the five published programs into tasks of one base."
    epilog: ClassVar[str] = "Exit status: 0 done; 2 a mistake, or a file that is not what --from says."
    positional: ClassVar[tuple[str, ...]] = ("files",)
    required: ClassVar[tuple[str, ...]] = ("files", "source")
    missing: ClassVar[str] = "name files and what they are, e.g. taps import model_best.pth --from taps"
    files: list[str] = setting([], "checkpoints, or folders of PEFT adapters; each becomes a task; for adashare, dynashare and automtl, one file gives all of its tasks", nargs="+", metavar="FILE")
    source: str | None = setting(None, "taps, adashare, dynashare, automtl, efficient_mtl: checkpoints of the published programs; state_dict: a fully fine-tuned network; peft: LoRA adapters", choices=SOURCES, aliases=("--from",))
    model_type: str | None = setting(None, "the timm model that was tuned", metavar="NAME", shown="for taps, the ResNet in the file")
    model_path: str | None = setting(None, "weights of that model before it was tuned", metavar="FILE", shown="those of timm; for taps, those in the file")
    tasks: list[str] | None = setting(None, "names of the tasks; for adashare and dynashare in the program's order", nargs="+", metavar="NAME", shown="named after the files, or as in the file")
    policy: str | None = setting(None, "adashare, dynashare: the policy that the network was trained under, policyIter…_rs….pickle", metavar="FILE", shown="the most probable one in the checkpoint")
    target_rates: list[float] | None = setting(None, "dynashare: target_rates of the run; blocks with 1 do not choose for single images", float, nargs="+", low=0, high=1, metavar="RATE")
    out: str = setting("results/imported", "folder of the tasks' folders", metavar="DIR")
    classes: list[str] | None = setting(None, "a text file with one class name per line, for each task", nargs="+", metavar="FILE", shown="the classes have no names")
    input_size: int = setting(224, "side length of the network's input", int, low=1, metavar="PIXELS")
    resize: int | None = setting(None, "shorter side of images before the centre crop", int, low=1, metavar="PIXELS", shown="8/7 of the input size; of the published programs' files the input size")
    cropped: bool = setting(False, "images were resized to a square, not cropped, as with --cropped in training", bool)
    max_error: float | None = setting(None, "store deltas in the fewest bytes whose relative error is at most this, e.g. 0.1", float, low=0, high=0.999, metavar="X", shown="exactly")
    overwrite: bool = setting(False, "replace earlier tasks of these names", bool, repeats=False)
