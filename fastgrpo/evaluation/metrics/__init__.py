"""What is measured of images besides safety: GenEval's rules, CLIP score and FID."""
