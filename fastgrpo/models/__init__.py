"""Stable Diffusion pipelines on disk: diffusers folders, hub repositories and original single files, read and written.

`check` refuses what is no SD 1.x / 2.x text-to-image pipeline before any weight is read: by the components' `configs`,
by the names and shapes of tensors, and by what a single file has `declared` of itself. `load` reads the components, and
`sound` refuses weights that are not finite. `other_unet` takes a UNet from elsewhere. `tensor_file` reads weights
without running them, `single_file` knows the original layout, `tokenizer` builds CLIP's tokenizer, `save` writes a
diffusers folder. The folders sd1 and sd2 hold the components' configs, which a single file does not.
"""
