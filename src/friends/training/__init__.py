"""The loop, its contract with defenses, and the judge."""

from friends.training.defense import ABSTAIN as ABSTAIN
from friends.training.defense import About as About
from friends.training.defense import Defense as Defense
from friends.training.defense import Predictor as Predictor
from friends.training.defense import Run as Run
from friends.training.evaluate import accuracy as accuracy
from friends.training.evaluate import confidence as confidence
from friends.training.evaluate import success as success
from friends.training.fit import Fitted as Fitted
from friends.training.fit import fit as fit
from friends.training.recipe import RECIPES as RECIPES
from friends.training.recipe import Recipe as Recipe
