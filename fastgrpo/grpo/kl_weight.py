"""The weight of the loss's KL term, which may be another in every iteration."""

import torch


class KlWeight:
    """The number that multiplies the KL divergence from the base model.

    value: the number. operand: [1] float32 on the device, the same number. Its address never changes: a captured graph
    reads anew at every replay what lies there.
    """

    def __init__(self, value: float, device: torch.device):
        self.value = value
        self.operand = torch.full((1,), value, dtype=torch.float32, device=device)

    def set(self, value: float) -> None:
        """For the passes from here on; does not wait for the device."""
        if value != self.value:
            self.value = value
            self.operand.fill_(value)
