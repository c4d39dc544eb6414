"""What is trained on: images as bytes, what an attack wants of them, and where they come from."""

from friends.data.augment import Augment as Augment
from friends.data.images import LabeledImages as LabeledImages
from friends.data.poisoned import Goal as Goal
from friends.data.poisoned import Patch as Patch
from friends.data.poisoned import PoisonedDataset as PoisonedDataset
