"""Metrics of several processes added up, as Prometheus would do it.

Counters and histograms are sums. Gauges are sums as well: open files, connections, bytes. Where a sum means nothing it
is the smallest or the largest, as the gauge's own `multiprocess_mode` says.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = ["Families", "counted", "families", "merged"]

Sample = tuple[str, dict[str, str], float]
Family = tuple[str, str, str, list[Sample]]  # name, documentation, type, samples
Families = Sequence[Family]  # lists when they have been JSON
_Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]

_COUNTED = frozenset({"counter", "histogram", "summary"})
_MODES = {"min": min, "livemin": min, "max": max, "livemax": max}
_SMALLEST = ("_created", "process_start_time_seconds")  # times: the earliest


def families(registry: "CollectorRegistry") -> Families:
    """Return what a registry has, as it can be written to a file."""
    return [
        (
            each.name,
            each.documentation,
            each.type,
            [(sample.name, sample.labels, sample.value) for sample in each.samples],
        )
        for each in registry.collect()
    ]


def counted(several: Iterable[Families]) -> Families:
    """Return what processes have counted that are gone; what they measured went with them."""
    return [
        (name, documentation, kind, [(sample, dict(labels), value) for (sample, labels), value in values.items()])
        for name, documentation, kind, values in _sums(several, {})
        if kind in _COUNTED
    ]


def merged(several: Iterable[Families], registry: "CollectorRegistry") -> "Iterator[Metric]":
    """Yield the metrics of several processes, each once; how their gauges are joined is the registry's to say."""
    from prometheus_client.core import Metric  # noqa: PLC0415 - whoever has a registry has loaded it

    for name, documentation, kind, values in _sums(several, _modes(registry)):
        metric = Metric(name, documentation, kind)
        for (sample, labels), value in values.items():
            metric.add_sample(sample, dict(labels), value)
        yield metric


def _sums(several: Iterable[Families], modes: dict[str, str]) -> Iterator[tuple[str, str, str, _Values]]:
    known: dict[str, tuple[str, str, _Values]] = {}
    for name, documentation, kind, samples in chain.from_iterable(several):
        values = known.setdefault(name, (documentation, kind, {}))[2]
        for sample, labels, value in samples:
            key = (sample, tuple(sorted(labels.items())))
            values[key] = _join(sample, kind, modes.get(name))((values[key], value)) if key in values else value
    return ((name, *rest) for name, rest in known.items())


def _join(sample: str, kind: str, mode: str | None) -> Callable[[Iterable[float]], float]:
    if sample.endswith(_SMALLEST):
        return min
    if kind in _COUNTED:
        return sum
    if kind == "gauge" and not sample.endswith("_info"):
        return _MODES.get(mode or "", sum)
    return max


def _modes(registry: "CollectorRegistry") -> dict[str, str]:
    """Return how each gauge wants to be joined; prometheus_client has no public way to ask."""
    collectors = dict(registry._collector_to_names)  # noqa: SLF001 - see above
    return {
        name: mode
        for collector, names in collectors.items()
        if (mode := getattr(collector, "_multiprocess_mode", None)) is not None
        for name in names
    }
