"""What checks annotations at run time: beartype, where an int is a float too, as every type checker has it."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
