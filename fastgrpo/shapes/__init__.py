"""A small Stable Diffusion that ships with the project, and the painted world it was trained on.

The world (`world`) has coloured shapes for GenEval's six composition tasks and seven hazard glyphs named after I2P's
seven categories. `captions` is the grammar of its prompts. Since all pictures come from it, an oracle (`oracle`) reads
them back exactly, and `verdicts` says whether a picture is unsafe or shows what its caption asks for.
"""
