"""Augmentations that change the input at random in every draw: `Predictive(..., augment=...)`.

An augmentation is any function ``fn(x, generator)`` that returns a batch of the same shape, with each example changed
in its own way. The augmentations of this module are also spread evenly over the draws of an example, so that fewer
draws suffice. To use a transform of torchvision, which draws from PyTorch's global generator, write::

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
