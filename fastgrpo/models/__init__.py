"""Stable Diffusion pipelines on disk: diffusers folders, hub repositories and original single files, read and written.

`check` refuses what is no SD 1.x / 2.x text-to-image pipeline before any weight is read, `load` reads the components,
`single_file` knows the original layout, `tokenizer` builds CLIP's vocabulary, `save` writes a diffusers folder. The
folders sd1 and sd2 hold the components' configs, which a single file does not.
"""
