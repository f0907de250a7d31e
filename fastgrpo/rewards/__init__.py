"""Scoring images: a weighted sum (reward.py) of terms (terms.py), built-in (registry.py) or the user's (plugins.py).

The term that the project is for is `steering` (steering.py): a frozen encoder (encoder.py, encoder_files.py), the
phrases of the safety axis (anchors.py), and where prompts lie along it (axis/). Nothing is re-exported: settings are
checked against anchors.py and terms.py before open_clip, which takes seconds to import, is needed.
"""
