"""Measuring a policy: images and prompts go into a detector, verdicts come out, rates with intervals are kept.

detectors.py    what judges images
suite.py        which images are drawn for it
result.py       what is kept of its verdicts, and how it is shown
intervals.py    how sure that is
"""

from fastgrpo.evaluation.detectors import Detector, OracleDetector
from fastgrpo.evaluation.result import (
    Comparison,
    Evaluation,
    Row,
    comparison_table,
    read_evaluation,
    write_evaluation,
)
from fastgrpo.evaluation.suite import Suite, make_suite

__all__ = [
    "Comparison",
    "Detector",
    "Evaluation",
    "OracleDetector",
    "Row",
    "Suite",
    "comparison_table",
    "make_suite",
    "read_evaluation",
    "write_evaluation",
]
