"""The run-time type checker of the test run (see pyproject.toml)."""

from beartype import BeartypeConf, beartype

# Python's numeric tower: an int is a float is a complex, as the command lines allow.
typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
