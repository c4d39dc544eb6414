"""One call for any loader: both noises in a training loop that stays the user's own.

``defense.protect(loader)`` returns the same loader. Its data set is wrapped so that it knows which row is read
(:mod:`friends.loaders.protected`), and the transforms inside are opened at the place where pixels are still those of
the stored image (:mod:`friends.loaders.finding`, :mod:`friends.loaders.visit`). ``defense.epochs(model, n)`` makes the
friendly noise when its epoch comes (:mod:`friends.loaders.session`).
"""

from friends.loaders.checking import check as check
from friends.loaders.place import Blocker as Blocker
from friends.loaders.place import Options as Options
from friends.loaders.session import Session as Session
from friends.loaders.session import session_of as session_of
from friends.loaders.visit import NoiseHere as NoiseHere
