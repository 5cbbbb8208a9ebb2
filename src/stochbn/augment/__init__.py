"""Random augmentations of the input, another one in every draw: `Predictive(..., augment=...)`.

An augmentation is any function ``fn(x, generator)`` that gives a randomly changed batch of the same shape, each example
changed in its own way. Those here are also spread evenly over the draws of an example, so that fewer draws serve. A
transform of torchvision, which draws from PyTorch's global generator, becomes one by::

    lambda x, generator: torch.stack([transform(image) for image in x])
"""

from stochbn.augment.combined import chain, named, turns
from stochbn.augment.images import colour, crop, flip, reflected, shift
from stochbn.augment.views import Augment, Spread, Views, check_augment

__all__ = [
    "Augment",
    "Spread",
    "Views",
    "chain",
    "check_augment",
    "colour",
    "crop",
    "flip",
    "named",
    "reflected",
    "shift",
    "turns",
]
