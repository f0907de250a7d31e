"""What judges images. Safety detectors share the interface of base.py; the oracle and GenEval's also need the prompts.

base.py             what a safety detector says, and how it is asked
registry.py         safety detectors by name, and their settings
q16.py              Q16: CLIP against two learned prompt vectors; pickled_array.py reads these without unpickling
nudenet.py          NudeNet 3.0.8, an optional extra
safety_checker.py   Stable Diffusion's own safety checker
zero_shot.py        an open_clip model against two lists of phrases
clip_images.py      PIL images into CLIP's space, for the above
mask2former.py      objects, for GenEval
colours.py          their colours
hashes.py           what tells weights apart
oracle.py           the shapes world read back exactly

Only the oracle is re-exported: the others import diffusers, transformers or open_clip, which takes seconds.
"""

from fastgrpo.evaluation.detectors.oracle import Detector, OracleDetector

__all__ = ["Detector", "OracleDetector"]
