"""Data, backbone and preprocessing that a run's settings name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from taps.data.classification.folders import Reading, find_tasks
from taps.data.classification.images import TaskData
from taps.data.generated.demo import make_demo, read_demo
from taps.networks.backbones import create_backbone, needs_image_size
from taps.networks.preprocessing import Preprocessing, of_network
from taps.settings.adaptation import AdaptationSettings
from taps.settings.multi_task import MultiTaskSettings


def read_data(
    paths: Sequence[str] | None, options: AdaptationSettings | MultiTaskSettings, all_tested: bool = False
) -> list[TaskData]:
    """The tasks in ``paths``; without paths those of the demo, which are generated if missing.

    ``all_tested``: as in :class:`taps.data.classification.folders.Reading`.
    """
    if paths:
        fraction = options.test_fraction if isinstance(options, AdaptationSettings) else Reading.test_fraction
        by_name = False if isinstance(options, AdaptationSettings) and not options.cropped_names else None
        cropped = True if options.cropped else by_name
        return find_tasks(paths, Reading(cropped, fraction, options.seed, all_tested))
    root = Path("datasets/demo")
    make_demo(root)
    return read_demo(root)


def make_base(options: AdaptationSettings | MultiTaskSettings, path: Path | None = None) -> torch.nn.Module:
    """The backbone that the options name, with its own weights or those in ``path``; random weights depend on the seed."""
    torch.manual_seed(options.seed)
    size = {"img_size": options.input_size} if needs_image_size(options.model_type, options.input_size) else {}
    path = path or options.model_path or None
    net = create_backbone(options.model_type, pretrained=options.pretrained, path=path, **size)
    net.taps_origin["seed"] = options.seed
    return net


def make_preprocessing(options: AdaptationSettings | MultiTaskSettings, net: torch.nn.Module) -> Preprocessing:
    """Preprocessing with the options' input size and the mean, std and interpolation of the backbone's training."""
    reading = {name: getattr(options, name) for name in ("background", "published") if hasattr(options, name)}
    of_base = of_network(net)
    if getattr(options, "interpolation", None):
        of_base["interpolation"] = options.interpolation
    prepare = Preprocessing(input_size=options.input_size, resize=options.resize, **of_base, **reading)
    prepare.transform(
        True, policy=getattr(options, "auto_augment", None)
    )  # refuses an unknown policy before anything is written
    return prepare
