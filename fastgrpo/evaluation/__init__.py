"""Measuring a policy: images and prompts go into a detector, verdicts come out, rates with intervals are kept.

While training (fastgrpo/evaluation/exam.py), on the embedded world:

    suite.py        which images are drawn, and judged at once
    result.py       rates with intervals
    stages.py       what is kept of the policy before training, and after: a verdict per image
    before_after.py evaluation.json of a run: both, the test of their difference, and how they are shown
    held_out.py     the reward under an encoder that nothing is trained on

From the command `python -m fastgrpo.evaluate`, and while training (in_training.py), on any model:

    suites/         the protocols: which images, which judges, which tables
    settings.py     what can be set for them
    work.py         what is to be drawn and judged, stage by stage
    images.py       folders of images, drawn once and continued after a kill
    drawing.py      how a batch of them is drawn
    judged.py       what judges say of them, kept beside them
    outcome.py      evaluation.json; verdicts.py: one value per image; tables.py: console and Markdown
    compare.py      two models on the same prompts and seeds
    published.py    published results, to stand beside

Both use detectors/ (what judges images), geneval.py (GenEval's rules), clip_score.py, fid.py, inception.py, intervals.py and paired.py
(how sure a number is), sentences.py (better, worse or undecided), and seeds.py.

Nothing is re-exported: reading results back needs no diffusers, which takes seconds to import.
"""
