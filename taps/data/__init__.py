"""Data: one module a dataset family, and :func:`find_tasks`, which recognises which family a path belongs to."""

from taps.data.folders import find_tasks
from taps.data.images import ImageSet, Preprocessing, TaskData, make_loader, split_validation, without_bad_images

__all__ = [
    "ImageSet",
    "Preprocessing",
    "TaskData",
    "find_tasks",
    "make_loader",
    "split_validation",
    "without_bad_images",
]
