"""Task names of the published programs, accepted as aliases of the library's own names."""

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
