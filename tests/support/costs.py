"""The costs of a model and of a reward's encoder, made up."""

from fastgrpo.costs.counting import EncoderCost, ModelCost
from fastgrpo.costs.held_memory import PeakBytes

# All are primes, so that no two different sums of them agree by accident. Up to ten samples the backward pass is at its
# worst with all gradients there, then with all activations.
MODEL = ModelCost(
    unet=10007,
    trained=10007,
    frozen=5003,
    text_encoder=2003,
    latent_shape=(4, 64, 64),
    image_shape=(3, 512, 512),
    forward=101,
    forward_backward=307,
    decode=503,
    activations=1009,
    saving=1013,
    learning=PeakBytes(((20_011, 13), (7, 1021))),
    passing=211,
    decoding=401,
)
ENCODERS = {"hpsv2": EncoderCost(parameters=3001, text=1201, image=701, encoding=601)}
