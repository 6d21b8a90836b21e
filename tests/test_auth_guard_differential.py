"""Random tables of routes and random requests: without a caller nothing is reached, with one everything as before.

For thousands of new ones: ROUTING_EXAMPLES=5000 pytest tests/test_auth_guard_differential.py
"""

import asyncio
import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routed import ask
from test_routing_differential import EXAMPLES, KNOWN_KINDS, OPTIONS, Table, requests, tables

from fastapi_prodkit.auth import Auth, guard_routes, hash_api_key, new_api_key
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.routing import index_routes
from fastapi_prodkit.sections import AuthSettings

KEY = new_api_key()
SETTINGS = AuthSettings(api_keys=(f"bot {hash_api_key(KEY)}",))
NO_HANDLER = {401, 404, 307}  # nobody is there, nothing is there, and the way to a path that is guarded


@settings(
    max_examples=EXAMPLES,
    derandomize="ROUTING_EXAMPLES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.data(), OPTIONS, st.booleans())
def test_nothing_is_reached_without_a_caller(data, options, has_index):
    """With one, status and body are those of the same app without a guard; also after routes were added."""
    kinds = data.draw(st.sampled_from([KNOWN_KINDS, [*KNOWN_KINDS, "foreign", "unknown"]]))
    table = data.draw(tables(kinds))
    plain, guarded = Table(table, options), Table(table, options)
    for routes in (plain, guarded):
        add_problem_handlers(routes.app)
    if has_index:
        index_routes(guarded.app)
    guard_routes(guarded.app, Auth(SETTINGS))

    async def compare():
        for _ in range(2):
            drawn = data.draw(st.lists(requests(plain.known()), min_size=1, max_size=8))
            for method, path, root_path, headers in drawn:
                known = (*headers, (b"x-api-key", KEY.encode()))
                expected = await ask(plain.app, method, path, root_path=root_path, headers=known)
                admitted = await ask(guarded.app, method, path, root_path=root_path, headers=known)
                refused = await ask(guarded.app, method, path, root_path=root_path, headers=headers)
                assert (admitted.messages, admitted.error) == (expected.messages, expected.error)
                assert not any(message["type"] == "websocket.accept" for message in refused.messages)
                assert refused.status in {None, *NO_HANDLER}, (method, path, refused)
            leaf, place = data.draw(tables(kinds, depth=0)), data.draw(st.integers(0, len(plain.routers) - 1))
            for routes in (plain, guarded):
                for each in leaf:
                    routes.add(routes.routers[place], each)

    asyncio.run(compare())
