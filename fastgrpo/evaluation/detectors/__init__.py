"""What looks at images: safety detectors, GenEval's detector of objects and colours, and the embedded world's oracle.

Only the oracle is re-exported: the others import diffusers, transformers or open_clip, which takes seconds.
"""

from fastgrpo.evaluation.detectors.oracle import Detector, OracleDetector

__all__ = ["Detector", "OracleDetector"]
