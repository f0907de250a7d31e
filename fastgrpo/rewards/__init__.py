"""Scoring images: a frozen encoder (encoder.py), the phrases of the safety axis (anchors.py), the reward (steering.py)."""
