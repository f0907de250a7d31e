"""Gradient checkpointing (Chen et al., arXiv 1604.06174): blocks keep their inputs and are computed again, going back.

diffusers decides what a block is: every transformer block, and every ResNet block but the first in the middle. Between
them the maps that norms, projections and changes of size save are kept as before. Forward passes without gradients are
not affected.
"""

from functools import partial

from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint

# Nothing in a pass draws random numbers: the UNet is in eval mode, where dropout does nothing. So their state need not
# be kept, which would wait for the device in every block, and which a CUDA graph could not record.
# Only without `use_reentrant` may gradients be asked for with torch.autograd.grad.
checkpointed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""(block, its inputs...) -> its output, the same bits; what the block saves is computed again when it is needed."""


def checkpoint_blocks(unet: UNet2DConditionModel) -> None:
    """Lets passes with gradients keep the blocks' inputs only, in place: the same bits, less memory, more work.

    `unet.is_gradient_checkpointing` then says so. Raises ValueError for a network none of whose blocks can do it.
    """
    unet.enable_gradient_checkpointing(checkpointed)
