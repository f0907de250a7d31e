"""Measuring a policy: images and prompts go into a detector, verdicts come out, rates with intervals are kept.

detectors.py    what judges images
suite.py        which images are drawn for it
result.py       what is kept of its verdicts, and how it is shown
intervals.py    how sure that is

Nothing is re-exported: reading results back needs no diffusers, which takes seconds to import.
"""
