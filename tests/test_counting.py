"""Clear the counters of a process, for tests."""

import gc

from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr
from starlette.requests import Request

from fastapi_prodkit import Settings, _counting, create_app
from fastapi_prodkit._bearer import BearerToken
from fastapi_prodkit.rate_limit import Limiter, MemoryStore, RateLimit


def test_clear_counts_resets_every_limit():
    """The default limit, limits of routes, slowapi's, and wrong tokens."""
    limiter = Limiter()
    app = create_app(Settings(environment="test", rate_limit={"default": "3/minute"}))
    app.add_api_route("/limited", lambda: "ok", dependencies=[Depends(RateLimit("1/minute"))])
    bare = FastAPI()
    bare.add_api_route("/limited", lambda: "ok", dependencies=[Depends(RateLimit("1/minute"))])

    @bare.get("/decorated")
    @limiter.limit("1/minute")
    async def decorated(request: Request):
        return "ok"

    client, other = TestClient(app), TestClient(bare)

    def statuses():
        first = [client.get("/limited").status_code for _ in range(2)] + [client.get("/no").status_code for _ in "12"]
        return first + [other.get(path).status_code for path in ("/limited", "/decorated") for _ in range(2)]

    before = statuses()
    _counting.clear_counts()

    assert statuses() == before == [200, 429, 404, 429, 200, 429, 200, 429]


def test_clear_counts_resets_wrong_tokens():
    """Clearing the counts lifts a client's lock after wrong tokens, so that tests do not affect each other."""
    token = BearerToken(SecretStr("a-token-of-operators"))

    def sent(value):
        headers = [(b"authorization", f"Bearer {value}".encode())]
        return token.is_sent(Request({"type": "http", "headers": headers, "client": ("203.0.113.1", 1)}))

    for _ in range(10):
        sent("wrong")
    locked = sent("a-token-of-operators")
    _counting.clear_counts()

    assert not locked
    assert sent("a-token-of-operators")


def test_registered_store_is_garbage_collected():
    """Registering a store keeps only a weak reference, so that the store is freed with its app."""
    store = MemoryStore()
    before = len(_counting._every)

    del store
    gc.collect()

    assert len(_counting._every) < before
