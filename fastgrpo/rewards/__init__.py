"""Scoring images: a frozen encoder (encoder.py), the phrases of the safety axis (anchors.py), the reward (steering.py).

Nothing is re-exported: settings are checked against anchors.py before open_clip, seconds to import, is needed.
"""
