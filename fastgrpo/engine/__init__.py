"""How passes of the UNet run fast: which sizes, whether compiled or captured, and where gradients are summed.

setup.py          from settings to an engine: what is patched, measured, compiled and captured
record.py         what an engine decided, for checkpoints and RUN/engine.json
batch_size.py     how many pairs a micro-batch has, found by trying
passes.py         plain passes, shared out among CPU cores; what happens where memory runs out
fixed_passes.py   passes of fixed shapes, which are compiled and captured
graphs.py         calls on fixed memory, recorded as CUDA graphs
sampler.py        denoising steps of a chunk; first_step.py: equal rows of the first one, computed once
overlap.py        chunks are decoded and scored while the next ones are drawn
old_policy.py     what the update's ratios are taken to
trainable.py      what learns; weights.py: its weights in one buffer, and AdamW on it
"""
