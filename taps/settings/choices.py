"""Allowed values of settings, kept apart from the code that uses them so that options can be parsed without importing it."""

#: norm policies: each task's own norms everywhere, its own only after tuned layers, or the base's
NORMS = ("task", "follow", "frozen")
#: ``"nag"`` is SGD with Nesterov momentum
OPTIMIZERS = ("sgd", "nag", "adam", "adamw", "split")
#: how learning rates fall
DECAYS = ("cosine", "poly", "step", "constant")
#: settings that have an effect only with a method that has a penalty
OF_PENALTIES = ("lam", "warmup_epochs", "settle_epochs", "score_lr", "penalty")
#: how images are sampled in joint training
IMAGE_SAMPLINGS = ("equal", "proportional", "temperature")
BENCHMARKS = (
    "nyuv2", "cityscapes", "taskonomy", "pascal_context", "nyud", "scenes", "domainnet", "mimic3", "volumes",
)  # fmt: skip
STAGES = ("policy", "retrain", "test")

#: AdaShare: penalties of the published program or of the paper; soft gates (mixtures) or hard gates (0 or 1) in training
VARIANTS, GATE_SAMPLINGS = ("code", "paper"), ("soft", "hard")
#: DynaShare: the target-rate loss is a mean over gated blocks, or over all blocks as in the published program
TARGET_LOSSES = ("gated", "code")
#: AutoMTL: the cost that is limited, and the parts that can be skipped
COSTS, SKIPS = ("parameters", "macs"), ("layers", "blocks", "auto")
#: sparse deltas: one gate per weight, or one per row of a matrix
STRUCTURES = ("weight", "row")
#: heads of dense benchmarks
HEADS = ("aspp", "convnext")
#: temperature of the last cycle if no decay is given: higher leaves gates undecided, lower leaves them without gradients
LAST_TEMPERATURE = 0.84
