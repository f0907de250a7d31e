"""What looks at images: safety detectors, GenEval's detector of objects and colours, and the embedded world's oracle.

Nothing is re-exported: most of it imports diffusers, transformers or open_clip, which takes seconds.
"""
