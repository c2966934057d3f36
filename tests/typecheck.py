"""How annotations are checked while the tests run: beartype, with an int welcome where a float is asked for."""

from beartype import BeartypeConf, beartype

typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
