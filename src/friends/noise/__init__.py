"""The two noises of FRIENDS; usable without the rest of the package."""

from friends.noise.dataset import DeviceNoise as DeviceNoise
from friends.noise.dataset import NoisyDataset as NoisyDataset
from friends.noise.friendly import PAPER as PAPER
from friends.noise.friendly import RELEASED as RELEASED
from friends.noise.friendly import FriendlySettings as FriendlySettings
from friends.noise.friendly import friendly_noise as friendly_noise
from friends.noise.random import add_noise as add_noise
from friends.noise.random import random_noise as random_noise
from friends.noise.store import NoiseStore as NoiseStore
