"""Defenses by name. A new one is a file and a row here; the tests of all defenses take it up unasked."""

from friends.defenses.friends import Friends as Friends
from friends.training.defense import Defense

DEFENSES: dict[str, type[Defense]] = {
    "friends": Friends,
}
