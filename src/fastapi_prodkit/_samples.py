"""Metrics of several processes added up, as Prometheus would do it.

Counters and histograms are sums. Gauges are sums as well: open files, connections, bytes. Where a sum means nothing it
is the smallest or the largest, as the gauge's own `multiprocess_mode` says.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from math import isfinite
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = ["Collectors", "Families", "counted", "dump", "families", "load", "merged"]

Sample = tuple[str, dict[str, str], float]
Family = tuple[str, str, str, list[Sample]]  # name, documentation, type, samples
Families = Sequence[Family]  # lists when they have been JSON
_Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]

_COUNTED = frozenset({"counter", "histogram", "summary"})
_MODES = {"min": min, "livemin": min, "max": max, "livemax": max}
_SMALLEST = ("_created", "process_start_time_seconds")  # times: the earliest


_logger = logging.getLogger("fastapi_prodkit.metrics")


class Collectors:
    """The collectors of a registry. One that raises is logged once, and hides nothing of what the others have.

    Args:
        registry: Whose collectors.
    """

    def __init__(self, registry: "CollectorRegistry") -> None:
        self._registry = registry
        self._failed: set[str] = set()  # the classes of collectors, and the names of metrics

    def collect(self) -> "Iterator[Metric]":
        """Yield the metrics: what a registry is asked for."""
        for each in self._each():
            try:
                yield from each.collect()
            except Exception as error:  # noqa: BLE001 - whatever a collector raises, the log says so
                self.log_failure(type(each).__qualname__, error)

    def log_failure(self, name: str, error: Exception) -> None:
        """Log the exception if it is the first of this collector or metric."""
        if name not in self._failed:
            self._failed.add(name)
            _logger.error("the metrics of %s cannot be collected; all others are shown", name, exc_info=error)

    def _each(self) -> Iterator[Any]:
        from prometheus_client import CollectorRegistry  # noqa: PLC0415 - loaded already where there is a registry

        registry = self._registry
        if type(registry).collect is not CollectorRegistry.collect:
            yield registry  # a subclass, which has its own idea of what it has
            return
        if target_info := registry.get_target_info():
            yield _TargetInfo(target_info)
        yield from dict(registry._collector_to_names)  # noqa: SLF001 - it has no public way to ask


class _TargetInfo:
    """What a registry says of its process, which is none of its collectors."""

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = labels

    def collect(self) -> "Iterator[Metric]":
        from prometheus_client.core import InfoMetricFamily  # noqa: PLC0415 - loaded already where there is a registry

        yield InfoMetricFamily("target", "Target metadata", value=self._labels)


def families(collectors: Collectors) -> Families:
    """Return what collectors have, as it can be written to a file; a metric whose value is no number is left out."""
    found = []
    for each in collectors.collect():
        try:
            samples = [(sample.name, _plain(sample.labels), float(sample.value)) for sample in each.samples]
        except (TypeError, ValueError) as error:
            collectors.log_failure(each.name, error)
        else:
            found.append((each.name, each.documentation, each.type, samples))
    return found


def dump(several: Families) -> bytes:
    """Return JSON, which has no number for infinities and NaN: those are texts."""
    return orjson.dumps(
        [
            (name, text, kind, [(sample, labels, _number(value)) for sample, labels, value in samples])
            for name, text, kind, samples in several
        ]
    )


def load(content: bytes) -> Families:
    """Return what was dumped.

    Raises:
        ValueError: The content is no JSON, or a name or type in it could not be shown.
        TypeError: The JSON has another shape.
    """
    from prometheus_client.core import Metric  # noqa: PLC0415 - loaded already where there are metrics

    found = []
    for name, documentation, kind, samples in orjson.loads(content):
        Metric(name, documentation, kind)  # refuses names and types that could not be shown
        found.append(
            (name, documentation, kind, [(each, _plain(labels), float(value)) for each, labels, value in samples])
        )
    return found


def counted(several: Iterable[Families]) -> Families:
    """Return what processes have counted that are gone; what they measured went with them."""
    return [
        (name, documentation, kind, [(sample, dict(labels), value) for (sample, labels), value in values.items()])
        for name, documentation, kind, values in _sums(several, {})
        if kind in _COUNTED
    ]


def merged(several: Iterable[Families], registry: "CollectorRegistry") -> "Iterator[Metric]":
    """Yield the metrics of several processes, each once; how their gauges are joined is the registry's to say."""
    from prometheus_client.core import Metric  # noqa: PLC0415 - loaded already where there is a registry

    for name, documentation, kind, values in _sums(several, _modes(registry)):
        metric = Metric(name, documentation, kind)
        for (sample, labels), value in values.items():
            metric.add_sample(sample, dict(labels), value)
        yield metric


def _plain(labels: dict[str, Any]) -> dict[str, str]:
    """Return the labels as texts that can be encoded: not with half of a surrogate pair, as a client may send it."""
    return {name: str(value).encode(errors="backslashreplace").decode() for name, value in labels.items()}


def _number(value: float) -> float | str:
    return value if isfinite(value) else str(value)


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
