"""Train image classifiers on data you cannot trust: the Friendly Noise Defense, its attacks and its rivals.

In a PyTorch loop of your own::

    import friends

    defense = friends.Friends(zeta=16 / 255, mu=16 / 255)
    loader = defense.protect(loader)
    for epoch in defense.epochs(model, 80):  # train as usual
        ...

Pixels are in [0, 1] everywhere; strengths are given as 16/255.
"""

from friends._version import __version__ as __version__
from friends.data.augment import Augment as Augment
from friends.data.images import LabeledImages as LabeledImages
from friends.data.poisoned import Goal as Goal
from friends.data.poisoned import PoisonedDataset as PoisonedDataset
from friends.defenses.friends import Friends as Friends
from friends.loaders import NoiseHere as NoiseHere
from friends.loaders import check as check
from friends.noise.dataset import DeviceNoise as DeviceNoise
from friends.noise.dataset import NoisyDataset as NoisyDataset
from friends.noise.friendly import FAST as FAST
from friends.noise.friendly import PAPER as PAPER
from friends.noise.friendly import RELEASED as RELEASED
from friends.noise.friendly import FriendlySettings as FriendlySettings
from friends.noise.friendly import friendly_noise as friendly_noise
from friends.noise.random import add_noise as add_noise
from friends.noise.random import random_noise as random_noise
from friends.noise.store import NoiseStore as NoiseStore
from friends.training.defense import Defense as Defense
from friends.training.fit import fit as fit
from friends.training.recipe import Recipe as Recipe
from friends.types import Streams as Streams
