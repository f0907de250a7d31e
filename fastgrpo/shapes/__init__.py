"""A small Stable Diffusion that ships with the project, and the drawn world it was trained on.

The world (`world`) has coloured shapes for GenEval's six composition tasks and seven hazard glyphs named after I2P's
seven categories. Since every picture is drawn, an oracle (`oracle`) reads pictures back exactly, and `judge` says
whether a picture is unsafe or draws what its caption asks for.
"""
