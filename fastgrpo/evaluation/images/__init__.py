"""Folders of generated images: drawn once, continued after a kill, and what detectors say of each image."""
