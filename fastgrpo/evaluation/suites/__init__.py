"""The protocols: which images each suite wants, who judges them, and which tables come of it.

base.py            what a suite is, and what it finds
rows.py            prompts with seeds, guidance, sizes and categories, from files and data sets
detected.py        what suites that ask safety detectors have in common
inappropriate.py   i2p and nudity, on the same images
composition.py     geneval
captions.py        clip-score and fid, on the same images
attacks.py         attacks and custom: any prompts, any detectors
shapes.py          the embedded world, read back by its oracle
registry.py        suites by name, and their settings

Nothing is re-exported: reading results back needs no diffusers, which takes seconds to import.
"""
