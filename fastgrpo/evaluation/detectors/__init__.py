"""What judges images. Safety detectors share the interface of base.py; the oracle also needs the prompts.

base.py             Finding, SafetyDetector, and what their loaders have in common
q16.py              Q16: CLIP ViT-L/14 against two learned prompt vectors
nudenet.py          NudeNet 3.0.8, an optional extra
safety_checker.py   Stable Diffusion's own safety checker
zero_shot.py        an open_clip model against two lists of phrases
registry.py         those by name
oracle.py           the shapes world read back exactly

Only the oracle is re-exported: the others import diffusers, transformers or open_clip, which takes seconds.
"""

from fastgrpo.evaluation.detectors.oracle import Detector, OracleDetector

__all__ = ["Detector", "OracleDetector"]
