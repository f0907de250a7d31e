"""What tells weights apart where their file is out of sight: SHA-256 of a module's tensors."""

import hashlib

import torch
from torch import nn


def weights_sha256(module: nn.Module) -> str:
    """In hex, of the name, dtype, shape and bytes of every tensor in the state, by name; the device does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # Bytes, since NumPy has no bfloat16; flattened first, since a scalar cannot be seen as bytes.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
