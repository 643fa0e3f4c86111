"""The options of the training programs and of ``evaluate.py``; they are declared in ``taps/settings``."""

from functools import partial

from taps.cli.options import (  # noqa: F401
    parse_evaluate,
    parse_import,
    parse_joint,
    parse_mtl,
    parse_predict,
    parse_sequential,
    parser_of,
)
from taps.settings.adaptation import EvaluateSettings, JointSettings, SequentialSettings
from taps.settings.importing import ImportSettings
from taps.settings.multi_task import MultiTaskSettings
from taps.settings.prediction import PredictSettings

sequential_parser = partial(parser_of, SequentialSettings)
joint_parser = partial(parser_of, JointSettings)
mtl_parser = partial(parser_of, MultiTaskSettings)
evaluate_parser = partial(parser_of, EvaluateSettings)
predict_parser = partial(parser_of, PredictSettings)
import_parser = partial(parser_of, ImportSettings)
