"""newrelic: as `newrelic-admin run-program` starts it, without New Relic's servers."""

ERRORS = ["broken", "broken_too"]
TRANSACTIONS = ["broken", "broken_too", "gone", "read_item", "stream"]


def attach(_app, sink):
    import newrelic.agent
    from newrelic.core.agent import agent_instance

    settings = newrelic.agent.global_settings()
    settings.developer_mode = True
    settings.license_key = "0" * 40
    newrelic.agent.initialize()
    application = newrelic.agent.register_application(timeout=10)
    sink.statistics = agent_instance().application(application.name)._stats_engine


def effects(sink):
    names = sorted(name for name, scope in sink.statistics.stats_table if not scope)
    transactions = [name for name in names if name.startswith("WebTransaction/Function/")]
    errors = [name for name in names if name.startswith("Errors/WebTransaction/Function/")]
    return {"transactions": _endpoints(transactions), "errors": _endpoints(errors)}


def _endpoints(names):
    """Return the names of endpoints; a path without a route is a transaction of Starlette's."""
    return [name.rpartition(".")[2] for name in names if "/service:add_routes." in name]


def test_newrelic_names_transactions_and_errors_by_endpoint(effects, way):
    """New Relic files each transaction and each error under the name of its endpoint."""
    assert effects(way, "before") == {"transactions": TRANSACTIONS, "errors": ERRORS}
