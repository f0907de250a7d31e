"""Group Relative Policy Optimization (Shao et al., arXiv 2402.03300) of a diffusion model's denoising steps."""
