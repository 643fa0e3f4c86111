"""Task names of the published programs, accepted as aliases of the library's own names."""

import re
from collections.abc import Iterable

#: aliases in dense benchmarks
DENSE = {
    "seg": "semseg", "sn": "normals", "normal": "normals", "keypoint": "keypoints", "edge": "edges", "sal": "saliency",
    "human_parts": "parts", "segment_semantic": "semseg", "depth_zbuffer": "depth", "keypoints2d": "keypoints",
    "edge_texture": "edges",
}  # fmt: skip
#: aliases in hospital stays
STAYS = {
    "mortality": "ihm", "decompensation": "decomp", "length_of_stay": "los", "phenotypes": "pheno", "phenotyping": "pheno",
}  # fmt: skip


#: tasks of the benchmarks that are generated if no data is named
GENERATED = {"scenes": ("semseg", "normals", "depth"), "mimic3": ("ihm", "decomp", "los", "pheno")}


def aliases(benchmark: str) -> dict[str, str]:
    """Return the aliases of a benchmark's tasks."""
    return {"mimic3": STAYS, "volumes": {}, "domainnet": {}}.get(benchmark, DENSE)


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Return names of tasks for names that are free text, such as columns of a table: distinct and fit for files.

    Example:
        >>> file_names(["race.ethnicity", "age"])
        {'race.ethnicity': 'race_ethnicity', 'age': 'age'}
    """
    found: dict[str, str] = {}
    for name in names:
        safe = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "target"
        number = 2
        while safe in found.values():
            safe, number = f"{safe.removesuffix(f'_{number - 1}')}_{number}", number + 1
        found.setdefault(name, safe)
    return found


#: entry among the labels of a training sample with the frame beside its image; no task has such a name
NEIGHBOUR = "neighbouring frame"
