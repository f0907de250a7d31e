"""Group Relative Policy Optimization (Shao et al., arXiv 2402.03300) of a diffusion model's denoising steps.

advantages.py     how much better than its group a sample is, and which samples are learned from
steps.py          which denoising steps an iteration learns from
pairs.py          (sample, step) pairs, and how they are dealt out to optimizer steps
micro_batch.py    the tensors that one pass takes, gathered from what a rollout left
loss.py           the loss of a micro-batch and its gradient
"""
