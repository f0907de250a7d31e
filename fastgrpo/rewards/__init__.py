"""Scoring images: a weighted sum (weighted.py) of terms (terms.py, registry.py, built_in.py, plugins.py).

The term that the project is for is `steering` (steering.py): a frozen encoder (encoder.py), the phrases of the safety axis
(anchors.py), and where prompts lie along it (axis.py). Nothing is re-exported: settings are checked against anchors.py
and terms.py before open_clip, seconds to import, is needed.
"""
