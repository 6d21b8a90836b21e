"""Metrics of pieces other than `metrics`."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from fastapi_prodkit._instruments import instrument


def test_two_apps_share_an_instrument():
    """prometheus_client would refuse a second one of the same name."""
    registry = CollectorRegistry()
    first = instrument(Counter, "kit_things_total", "Things.", ["kind"], registry=registry)
    second = instrument(Counter, "kit_things_total", "Things.", ["kind"], registry=registry)

    first.labels("a").inc()
    second.labels("a").inc()

    assert registry.get_sample_value("kit_things_total", {"kind": "a"}) == 2


def test_registries_have_separate_instruments():
    """A gauge set in one registry keeps its value of 0 in another registry."""
    first, second = CollectorRegistry(), CollectorRegistry()
    instrument(Gauge, "kit_level", "Level.", registry=first).set(3)
    instrument(Gauge, "kit_level", "Level.", registry=second)

    assert first.get_sample_value("kit_level") == 3
    assert second.get_sample_value("kit_level") == 0


def test_default_registry_is_that_of_prometheus_client():
    """An instrument created without a registry is registered in the default registry of prometheus_client."""
    from prometheus_client import REGISTRY

    instrument(Gauge, "kit_default_level", "Level.").set(1)

    assert REGISTRY.get_sample_value("kit_default_level") == 1
