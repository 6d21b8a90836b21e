"""Metrics of pieces other than `metrics`: each is created once in a registry, however many apps share the registry."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi_prodkit import _scope

Collector = TypeVar("Collector")

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics import MetricWrapperBase

    Instrument = TypeVar("Instrument", bound=MetricWrapperBase)


def instrument(
    kind: "type[Instrument]",
    name: str,
    documentation: str,
    labels: Sequence[str] = (),
    *,
    registry: "CollectorRegistry | None" = None,
    **options: Any,
) -> "Instrument":
    """Return the registry's metric of that name, made on first use.

    Args:
        kind: `Counter`, `Gauge` or `Histogram` of prometheus_client.
        name: As OpenTelemetry or Prometheus name it, with its unit.
        documentation: Its help text, one sentence.
        labels: Names of its labels; their values come from a bounded set, never from a client.
        registry: prometheus_client's default registry unless given.
        options: Further keywords of the kind, such as `buckets`.
    """
    from prometheus_client import REGISTRY  # noqa: PLC0415 - on first use: a piece without metrics does not load it

    target = registry or REGISTRY
    known: dict[str, Any] = vars(target).setdefault(_scope.REGISTRY_INSTRUMENTS, {})
    if name not in known:
        known[name] = kind(name, documentation, labels, registry=target, **options)
    made: Instrument = known[name]
    return made


def collector(kind: type[Collector], registry: "CollectorRegistry | None" = None) -> Collector:
    """Return the registry's collector of that class, made on first use.

    Args:
        kind: A class without arguments, with a method `collect`.
        registry: prometheus_client's default registry unless given.
    """
    from prometheus_client import REGISTRY  # noqa: PLC0415 - on first use

    target = registry or REGISTRY
    known: dict[str, Any] = vars(target).setdefault(_scope.REGISTRY_INSTRUMENTS, {})
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name not in known:
        known[name] = made = kind()
        target.register(made)  # type: ignore[arg-type]  # declared for its own base class, but only `collect` is called
    found: Collector = known[name]
    return found
