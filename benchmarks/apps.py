"""Every app of the benchmarks by its name. Only those modules are imported that an app needs."""

from candidates import Candidate
from ours import OURS

__all__ = ["find", "names"]


def peers() -> dict[str, Candidate]:
    from peers import PEERS

    return PEERS


def assemblies() -> dict[str, Candidate]:
    from assemblies import ASSEMBLIES

    return ASSEMBLIES


def names() -> list[str]:
    return [*OURS, *peers(), *assemblies()]


def find(name: str) -> Candidate:
    return OURS.get(name) or peers().get(name) or assemblies()[name]
