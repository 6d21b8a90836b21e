"""Rules about the process: the proxy in front, and the shutdown."""

from collections.abc import Iterator

from fastapi_prodkit.cli.doctor.facts import Facts
from fastapi_prodkit.cli.doctor.finding import Problem, rule
from fastapi_prodkit.shutdown import STOP_TIMEOUT

__all__ = ["RULES"]


@rule("proxy-untrusted", "warning", "Limits count the load balancer, not its clients")
def proxy_untrusted(facts: Facts) -> Iterator[Problem]:
    """Report rate limits without a trusted proxy: behind a proxy all clients would share one quota."""
    settings = facts.settings
    if settings is None or settings.rate_limit is None or "PROXY_TRUSTED" in facts.refused:
        return
    if settings.proxy is None or not settings.proxy.trusted:
        yield Problem(
            "Rate limits are on and no proxy is trusted: behind a load balancer all clients have its address, and so "
            "share one quota.",
            "Set PROXY_TRUSTED to the load balancer's addresses or networks. "
            "If no load balancer is in front, ignore this.",
        )


@rule("shutdown-too-long", "warning", "The platform kills the process before it has ended")
def shutdown_too_long(facts: Facts) -> Iterator[Problem]:
    """Report a shutdown that takes longer than platforms wait by default."""
    shutdown = getattr(facts.settings, "shutdown", None)
    if shutdown is not None and shutdown.drain + shutdown.grace > STOP_TIMEOUT:
        yield Problem(
            f"SHUTDOWN_DRAIN and SHUTDOWN_GRACE are {shutdown.drain + shutdown.grace:g} s together; ECS and Kubernetes "
            f"kill the process after {STOP_TIMEOUT:g} s by default.",
            "Shorten them, or raise stopTimeout (ECS) or terminationGracePeriodSeconds (Kubernetes).",
        )


@rule("shutdown-no-drain", "warning", "A deployment loses requests")
def shutdown_no_drain(facts: Facts) -> Iterator[Problem]:
    """Report a port that closes before load balancers stop sending requests."""
    if facts.settings is None:
        return
    shutdown = facts.settings.shutdown
    if shutdown is None or not shutdown.drain:
        what = "SHUTDOWN_ENABLED is false" if shutdown is None else "SHUTDOWN_DRAIN is 0"
        yield Problem(
            f"{what}: load balancers send requests to a port that is closed.", "Set SHUTDOWN_DRAIN to 5 or more."
        )


@rule("shutdown-cuts-requests", "info", "A shutdown aborts the longest requests")
def shutdown_cuts(facts: Facts) -> Iterator[Problem]:
    """Report a request time-out that is longer than the shutdown."""
    shutdown = getattr(facts.settings, "shutdown", None)
    limits = getattr(facts.settings, "limits", None)
    if shutdown is None or limits is None or limits.request_timeout is None:
        return
    left = shutdown.drain + shutdown.grace
    if limits.request_timeout > left:
        yield Problem(
            f"A request may take {limits.request_timeout:g} s (LIMITS_REQUEST_TIMEOUT), and a shutdown leaves it "
            f"{left:g} s (SHUTDOWN_DRAIN and SHUTDOWN_GRACE).",
            "Lower LIMITS_REQUEST_TIMEOUT, with Timeout for the routes that need more; or raise SHUTDOWN_GRACE.",
        )


RULES = (proxy_untrusted, shutdown_too_long, shutdown_no_drain, shutdown_cuts)
