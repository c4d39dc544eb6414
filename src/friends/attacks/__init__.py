"""Poisoning attacks, one file a paper: the table of their names.

A new attack is a frozen dataclass that fulfils :class:`Attack`, and a row in :data:`ATTACKS`.
"""

from __future__ import annotations

from friends.attacks import (
    badnets,
    bullseye_polytope,
    clean_label,
    convex_polytope,
    gradient_matching,
    hidden_trigger,
    metapoison,
    narcissus,
    poison_frogs,
    sleeper_agent,
)
from friends.attacks.badnets import BadNets
from friends.attacks.base import Attack, Surrogate, penultimate
from friends.attacks.bullseye_polytope import BullseyePolytope
from friends.attacks.clean_label import CleanLabelBackdoor
from friends.attacks.convex_polytope import ConvexPolytope
from friends.attacks.gradient_matching import GradientMatching
from friends.attacks.hidden_trigger import HiddenTrigger
from friends.attacks.metapoison import MetaPoison
from friends.attacks.narcissus import Narcissus
from friends.attacks.poison_frogs import PoisonFrogs
from friends.attacks.sleeper_agent import SleeperAgent

__all__ = [
    "ATTACKS",
    "Attack",
    "BadNets",
    "BullseyePolytope",
    "CleanLabelBackdoor",
    "ConvexPolytope",
    "GradientMatching",
    "HiddenTrigger",
    "MetaPoison",
    "Narcissus",
    "PoisonFrogs",
    "SleeperAgent",
    "Surrogate",
    "penultimate",
]

ATTACKS: dict[str, type[Attack]] = {
    gradient_matching.NAME: GradientMatching,
    bullseye_polytope.NAME: BullseyePolytope,
    poison_frogs.NAME: PoisonFrogs,
    convex_polytope.NAME: ConvexPolytope,
    sleeper_agent.NAME: SleeperAgent,
    hidden_trigger.NAME: HiddenTrigger,
    badnets.NAME: BadNets,
    clean_label.NAME: CleanLabelBackdoor,
    narcissus.NAME: Narcissus,
    metapoison.NAME: MetaPoison,
}
