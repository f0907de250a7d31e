"""Measuring a policy: images are drawn and read by detectors, and rates with intervals come of it.

    suites/             the protocols: which images, which detectors, which tables
    images/             folders of images, drawn once and continued after a kill; what detectors said of them
    detectors/          what reads images: safety detectors, objects and their colours, the embedded world's oracle
    metrics/            GenEval's rules, CLIP score, FID, MMD and the Vendi score
    statistics/         how sure a number is: intervals, and paired tests of two models
    results/            evaluation.json, tables, comparisons of two models, published numbers

    suite_run.py        draws and measures the images of suites: for the command and for a training
    during_training.py  when a training evaluates, and what it keeps of it
    feature_distance.py how far the pictures of benign prompts have moved, and how diverse they still are
    shared_prompts.py   the prompts that all evaluations of a training draw, and the numbers on them
    samples.py          picture grids of a training
    held_out_reward.py  the reward under an encoder that nothing is trained on
    sentences.py        better, worse or undecided, in words

Nothing is re-exported: reading results back needs no diffusers, which takes seconds to import.
"""
