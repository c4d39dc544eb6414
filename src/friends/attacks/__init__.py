"""Poisoning attacks, one file a paper: the table of their names.

A new attack is a frozen dataclass that fulfils :class:`Attack`, and a row in :data:`ATTACKS`.
"""

from __future__ import annotations

from friends.attacks import bullseye_polytope, gradient_matching
from friends.attacks.base import Attack, Surrogate, penultimate
from friends.attacks.bullseye_polytope import BullseyePolytope
from friends.attacks.gradient_matching import GradientMatching

__all__ = ["ATTACKS", "Attack", "BullseyePolytope", "GradientMatching", "Surrogate", "penultimate"]

ATTACKS: dict[str, type[Attack]] = {
    gradient_matching.NAME: GradientMatching,
    bullseye_polytope.NAME: BullseyePolytope,
}
