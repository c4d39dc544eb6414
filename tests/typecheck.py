"""The type checker that the tests run the package under: an int is a float, as everywhere in Python."""

from beartype import BeartypeConf, beartype

tower = beartype(conf=BeartypeConf(is_pep484_tower=True))
