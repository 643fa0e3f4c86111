"""Benchmarks of dense prediction: several maps of the same images."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from taps.benchmarks.base import Benchmark
from taps.data.dense.adashare_layout import layout_of, open_formatted
from taps.data.dense.astmt_layout import PROTOCOLS, open_protocol
from taps.data.dense.dataset import DenseData, DenseSet
from taps.data.dense.video_layout import is_video, open_video
from taps.data.generated.scenes import make_scenes
from taps.errors import UserError
from taps.metrics.losses import to_size
from taps.networks.dense_backbones import create_dense_backbone
from taps.networks.heads import ASPP, ConvNeXtHead
from taps.settings.multi_task import MultiTaskSettings
from taps.settings.task_names import DENSE
from taps.task_model import TaskModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: default folders of the benchmarks below the data root
FOLDERS = {
    "nyuv2": "nyu_v2",
    "cityscapes": "cityscapes",
    "taskonomy": "taskonomy",
    "pascal_context": "PASCALContext",
    "nyud": "NYUDv2",
    "scenes": "scenes",
}


@dataclass(frozen=True)
class DenseBenchmark(Benchmark):
    """A benchmark of dense prediction: several maps of the same images."""

    data: DenseData

    def without_frames(self) -> DenseBenchmark:
        splits = {
            name: [{key: path for key, path in sample.items() if key not in self.data.frames} for sample in samples]
            for name, samples in self.data.splits.items()
        }
        return replace(self, data=replace(self.data, splits=splits, frames=())) if self.data.frames else self

    def check_sample(self, samples: DenseSet, index: int, split: str) -> None:
        """Read a sample's files; the images of val and of test have to be of one size if batches or processes join them."""
        size, first = (self.data.size_of(samples.read(own)["image"]) for own in (index, 0))
        if split == "train" or size == first:
            return
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(
                f"{self.data.name}: the images of {split} differ in size, and processes cannot gather such maps: use one"
            )
        if self.options.batch_size > 1:
            raise UserError(f"{self.data.name}: the images of {split} differ in size: use --batch_size 1")

    def backbone(self) -> nn.Module:
        options = self.options
        torch.manual_seed(options.seed)
        return create_dense_backbone(
            options.model_type,
            options.pretrained,
            options.model_path,
            options.output_stride,
            options.channels,
            self.data.crop_size,
            options.patch_size,
            bool(options.deeplab),
        )

    def head(self, task: str, features: int) -> nn.Module:
        options, channels = self.options, self.data.tasks[task].channels
        if options.head == "convnext":
            return ConvNeXtHead(features, channels, options.head_width)
        return ASPP(features, channels, options.head_width, options.head_rates, options.head_dropout)

    def match(self, output: Tensor, target: Tensor) -> Tensor:
        mode = self.data.published_resize if self.options.metrics == "published" else "bilinear"
        return to_size(output, target.shape[-2:], mode)

    def shown(self, model: TaskModel, count: int = 3) -> list[dict]:
        samples = DenseSet(self.data, "test", False)
        rows = []
        for index in range(min(count, len(samples))):
            x, targets = samples[index]
            outputs = self.answers(model, x)
            predicted = {task: to_size(outputs[task][None], targets[task].shape[-2:])[0] for task in outputs}
            image = samples.read(index)["image"]
            top, left = ((have - own) // 2 for have, own in zip(x.shape[1:], image.shape, strict=False))
            inner = np.s_[
                ..., top : top + image.shape[0], left : left + image.shape[1]
            ]  # without the border of padding
            maps = ({task: own[inner] for task, own in maps.items()} for maps in (targets, predicted))
            rows.append({"image": image, **dict(zip(("targets", "predicted"), maps, strict=True))})
        return rows

    def picture(self, shown: list[dict]) -> Figure:
        from taps.plots import predictions

        return predictions.maps(shown, {name: task.kind for name, task in self.data.tasks.items()})


def open_dense(options: MultiTaskSettings, accelerator: Accelerator) -> DenseBenchmark:
    """Open the benchmark that the options name, with train not yet split.

    Raises:
        UserError: if the data is missing or invalid, or lacks a task.
    """
    if options.dataset and len(options.dataset) > 1:
        raise UserError(f"benchmark {options.benchmark} lies in one folder; --dataset names {len(options.dataset)}")
    root = Path(options.dataset[0]) if options.dataset else Path("datasets") / FOLDERS[options.benchmark]
    if options.benchmark == "scenes" and not options.dataset:
        with accelerator.local_main_process_first():
            make_scenes(root)
    names = list(dict.fromkeys(DENSE.get(name, name) for name in options.tasks or ()))
    video = options.benchmark == "nyud" and is_video(root)
    if options.frame_pull and not video:
        raise UserError(f"--frame_pull needs the frames around each image, which {root} lacks; see datasets/README.md")
    if video:
        data = open_video(root, names, bool(options.frame_pull))
    elif options.benchmark in PROTOCOLS:
        data = open_protocol(options.benchmark, root, names)
    else:
        data = open_formatted(options.benchmark, root, layout_of(options.benchmark, options.num_class))
        data = data.choose(names or list(data.tasks))
    return DenseBenchmark(replace(data, crop=options.crop) if options.crop else data, options)
