"""Aggregate the metrics of several processes, as Prometheus would.

Counters and histograms are summed. Gauges are summed as well, such as open files, connections and bytes. If a sum has
no meaning, the minimum or the maximum is used, by the gauge's `multiprocess_mode`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from math import isfinite
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric, Sample

__all__ = ["Collectors", "Families", "counters_only", "dump", "load", "merge"]

Families = Sequence["Metric"]
_Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]

_COUNTED = frozenset({"counter", "histogram", "summary"})
_MODES = {"min": min, "livemin": min, "max": max, "livemax": max}
_SMALLEST = ("_created", "process_start_time_seconds")  # points in time: the earliest one is used

_logger = logging.getLogger("fastapi_prodkit.metrics")


class Collectors:
    """Collect the valid metrics of a registry.

    If a collector fails, or yields a metric that cannot be encoded, this is logged once. The other metrics are shown.

    Args:
        registry: The registry to collect.
    """

    def __init__(self, registry: "CollectorRegistry") -> None:
        self._registry = registry
        self._left_out: set[str] = set()  # names of metrics, or of classes of collectors without names

    def collect(self) -> "Iterator[Metric]":
        """Yield the metrics; the interface of a registry."""
        for collector, names in self._each():
            owner = names[0] if names else type(collector).__qualname__
            try:
                for metric in collector.collect():
                    try:
                        shown = _checked(metric)
                    except Exception as error:  # noqa: BLE001 - a collector may yield anything; it is logged
                        self._log(str(getattr(metric, "name", owner)), error)
                    else:
                        yield shown
            except Exception as error:  # noqa: BLE001 - a collector may raise anything; it is logged
                self._log(owner, error)

    def _log(self, name: str, error: Exception) -> None:
        if name not in self._left_out:
            self._left_out.add(name)
            _logger.warning("the metrics of %s are left out, and all others shown", name, exc_info=error)

    def _each(self) -> Iterator[tuple[Any, Sequence[str]]]:
        """Yield each collector with its registered names."""
        from prometheus_client import CollectorRegistry  # noqa: PLC0415 - loaded already where there is a registry

        registry = self._registry
        if type(registry).collect is not CollectorRegistry.collect:
            yield registry, ()  # a subclass may override `collect`
            return
        if target_info := registry.get_target_info():
            yield _Only(_metric("target", "Target metadata", "info", [("target_info", target_info, 1)])), ("target",)
        yield from dict(registry._collector_to_names).items()  # noqa: SLF001 - there is no public function


class _Only:
    """A collector of one metric."""

    def __init__(self, metric: "Metric") -> None:
        self._metric = metric

    def collect(self) -> "Iterator[Metric]":
        yield self._metric


def dump(several: Families) -> bytes:
    """Encode metrics as JSON; infinities and NaN become strings, because JSON has no such numbers."""
    return orjson.dumps(
        [(each.name, each.documentation, each.type, [*map(_plain_sample, each.samples)]) for each in several]
    )


def load(content: bytes) -> Families:
    """Decode what `dump` has encoded.

    Raises:
        Exception: The content has another format.
    """
    return [_checked(_metric(name, text, kind, samples)) for name, text, kind, samples in orjson.loads(content)]


def counters_only(several: Iterable[Families]) -> Families:
    """Merge the metrics of dead workers: counters are kept, gauges are dropped."""
    return [each for each in _joined(several, {}) if each.type in _COUNTED]


def merge(several: Iterable[Families], registry: "CollectorRegistry") -> "Iterator[Metric]":
    """Yield the merged metrics of several processes; the registry's gauges say how they are merged."""
    return _joined(several, _modes(registry))


def _metric(name: str, documentation: str, kind: str, samples: Iterable[tuple[str, dict[str, str], float]]) -> "Metric":
    from prometheus_client.core import Metric  # noqa: PLC0415 - loaded already where there are metrics

    metric = Metric(name, documentation, kind)
    for sample in samples:
        metric.add_sample(*sample)
    return metric


def _checked(metric: "Metric") -> "Metric":
    """Return the metric if it can be encoded in every format and as JSON.

    Raises:
        Exception: It cannot be encoded: it is not a metric, a name or a text is missing or has a lone surrogate, a
            label is not a text, a value or a time is not a number, or an exemplar is not allowed there.
    """
    names = {name for each in metric.samples for name in (each.name, *each.labels)}
    if not all(names):
        raise ValueError("a sample or a label has no name")
    "".join((metric.name, metric.documentation, metric.unit, *names)).encode()  # raises for anything but texts
    checked = _metric(metric.name, metric.documentation, metric.type, ())
    checked.unit = metric.unit
    checked.samples = [each._replace(labels=_plain(each.labels), value=float(each.value)) for each in metric.samples]
    if not all(isfinite(float(each.timestamp)) for each in checked.samples if each.timestamp is not None):
        raise ValueError("a timestamp is not finite")
    if any(each.exemplar for each in checked.samples):
        _try_exemplars(checked)
    return checked


def _try_exemplars(metric: "Metric") -> None:
    """Encode the samples with exemplars; raises where OpenMetrics allows none, outside of counters and buckets."""
    from prometheus_client.openmetrics.exposition import generate_latest  # noqa: PLC0415 - only where there are some

    names = {name for each in metric.samples if each.exemplar for name in each.exemplar.labels}
    if not all(name.isascii() and name.isidentifier() for name in names):  # the encoder does not check or escape them
        raise ValueError("an exemplar has a label whose name is no identifier")
    tried = _metric(metric.name, metric.documentation, metric.type, ())
    tried.samples = [each for each in metric.samples if each.exemplar]
    generate_latest(_Only(tried))  # type: ignore[no-untyped-call]  # prometheus_client has no types for it


def _plain(labels: dict[str, str]) -> dict[str, str]:
    """Return the labels with lone surrogates, which clients may send, replaced by escapes.

    Raises:
        AttributeError: A value is not a text.
    """
    return {name: value.encode(errors="backslashreplace").decode() for name, value in labels.items()}


def _plain_sample(sample: "Sample") -> tuple[str, dict[str, str], float | str]:
    return sample.name, sample.labels, sample.value if isfinite(sample.value) else str(sample.value)


def _joined(several: Iterable[Families], modes: dict[str, str]) -> "Iterator[Metric]":
    known: dict[str, tuple[Metric, _Values]] = {}
    for metric in chain.from_iterable(several):
        first, values = known.setdefault(metric.name, (metric, {}))
        for each in metric.samples:
            key = (each.name, tuple(sorted(each.labels.items())))
            join = _join(each.name, first.type, modes.get(metric.name))
            values[key] = join((values[key], each.value)) if key in values else each.value
    for first, values in known.values():
        samples = ((sample, dict(labels), value) for (sample, labels), value in values.items())
        yield _metric(first.name, first.documentation, first.type, samples)


def _join(sample: str, kind: str, mode: str | None) -> Callable[[Iterable[float]], float]:
    if sample.endswith(_SMALLEST):
        return min
    if kind in _COUNTED:
        return sum
    if kind == "gauge" and not sample.endswith("_info"):
        return _MODES.get(mode or "", sum)
    return max


def _modes(registry: "CollectorRegistry") -> dict[str, str]:
    """Return each gauge's `multiprocess_mode`; prometheus_client has no public function for this."""
    collectors = dict(registry._collector_to_names)  # noqa: SLF001 - there is no public function
    return {
        name: mode
        for collector, names in collectors.items()
        if (mode := getattr(collector, "_multiprocess_mode", None)) is not None
        for name in names
    }
