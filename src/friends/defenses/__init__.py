"""Defenses by name. A new one is a file and a row here; the tests of all defenses take it up unasked."""

from friends.defenses.abl import ABL as ABL
from friends.defenses.activation_clustering import ActivationClustering as ActivationClustering
from friends.defenses.adversarial_poisoning import AdversarialPoisoning as AdversarialPoisoning
from friends.defenses.adversarial_training import AdversarialTraining as AdversarialTraining
from friends.defenses.deep_knn import DeepKNN as DeepKNN
from friends.defenses.dp_sgd import DPSGD as DPSGD
from friends.defenses.epic import Epic as Epic
from friends.defenses.friends import Friends as Friends
from friends.defenses.neural_cleanse import NeuralCleanse as NeuralCleanse
from friends.defenses.spectral_signatures import SpectralSignatures as SpectralSignatures
from friends.defenses.strip import Strip as Strip
from friends.defenses.strong_augmentation import CutMix as CutMix
from friends.defenses.strong_augmentation import Cutout as Cutout
from friends.defenses.strong_augmentation import DPInstaHide as DPInstaHide
from friends.defenses.strong_augmentation import MaxUp as MaxUp
from friends.defenses.strong_augmentation import Mixup as Mixup
from friends.training.defense import Defense

DEFENSES: dict[str, type[Defense]] = {
    "friends": Friends,
    "adversarial-poisoning": AdversarialPoisoning,
    "adversarial-training": AdversarialTraining,
    "abl": ABL,
    "mixup": Mixup,
    "cutmix": CutMix,
    "cutout": Cutout,
    "maxup": MaxUp,
    "dp-instahide": DPInstaHide,
    "deep-knn": DeepKNN,
    "spectral-signatures": SpectralSignatures,
    "activation-clustering": ActivationClustering,
    "strip": Strip,
    "neural-cleanse": NeuralCleanse,
    "dp-sgd": DPSGD,
    "epic": Epic,
}
