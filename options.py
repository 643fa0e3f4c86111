"""The options of the training programs and of ``evaluate.py``; they are declared in ``taps/cli``."""

from taps.cli.options import (  # noqa: F401
    evaluate_parser,
    import_parser,
    joint_parser,
    mtl_parser,
    parse_evaluate,
    parse_import,
    parse_joint,
    parse_mtl,
    parse_predict,
    parse_sequential,
    predict_parser,
    sequential_parser,
)
