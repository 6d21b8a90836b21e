"""What it costs to find out who calls, ours and its peers: a known token, a new one, none, and a forged one.

    python benchmarks/auth.py [--rounds 50]

Each app is measured in a process of its own, in turns with the same app without authentication; the table shows the
difference of the fastest rounds, in microseconds of CPU time. Tokens are signed with RS256 by an issuer on this
machine, whose keys are fetched before. "Requests" are those that the issuer has got for all of these tokens. No client
sends two forged tokens, because after ten in a minute they are refused unseen.

A second table shows how much memory the cache of known tokens takes at most, by `tracemalloc`.
"""

import asyncio
import gc
import itertools
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from asgi import App, Request, answer, in_another_process, output, scope_of
from fastapi import Depends, FastAPI
from ours import WHOLE, assembly
from starlette.requests import HTTPConnection
from tables import Table, parser_of, show

from fastapi_prodkit.auth import Auth, guard_routes
from fastapi_prodkit.routing import index_routes
from fastapi_prodkit.sections import AuthSettings
from fastapi_prodkit.sections.auth import PresetName
from fastapi_prodkit.testing import Issuer

PATH = "/items/42"
REFUSED = (401, 400)  # auth0-fastapi-api answers 400 to a request without a token
STATUSES = {"known token": (200,), "new token": (200,), "no token": REFUSED, "forged token": REFUSED}
CALLS = 6  # in a round
UNSIGNED = {"known token": 10, "no token": 10}  # times as many rounds, because no tokens have to be signed for them
DEPENDENCY = "Depends(auth.current_user)"
AUDIENCE = "orders"
SECRET = "a-secret-for-the-benchmark-of-32-bytes"
SENT = 12_000  # tokens, more than are kept
TOKENS: dict[str, dict[str, Any]] = {
    "few claims": {},
    "4 kB of claims": {"email": "x" * 4000},
}


def serve(app: FastAPI, *dependencies: Any) -> FastAPI:
    """Add the route that is measured."""

    @app.get("/items/{item_id}", dependencies=[Depends(each) for each in dependencies])
    async def read(item_id: int) -> dict[str, int]:
        return {"item_id": item_id}

    return app


def auth_of(issuer: Issuer) -> Auth:
    return Auth(issuer.settings(), ssl_context=issuer.ssl_context)


async def nothing() -> None: ...


def indexed() -> FastAPI:
    app = FastAPI()
    index_routes(app)
    return serve(app)


def guarded(issuer: Issuer) -> FastAPI:
    app = indexed()
    guard_routes(app, auth_of(issuer))
    return app


def auth0(issuer: Issuer) -> FastAPI:
    import httpx2
    from fastapi_plugin import Auth0FastAPI

    async def fetch(url: str) -> Any:  # its own client trusts no other certificates than certifi's
        async with httpx2.AsyncClient(verify=issuer.ssl_context) as client:
            return await client.get(url)

    domain = issuer.url.removeprefix("https://").rstrip("/")
    return serve(FastAPI(), Auth0FastAPI(domain=domain, audience=AUDIENCE, custom_fetch=fetch).require_auth())


def azure(issuer: Issuer) -> FastAPI:
    from fastapi_azure_auth import SingleTenantAzureAuthorizationCodeBearer

    scheme = SingleTenantAzureAuthorizationCodeBearer(
        AUDIENCE, "tenant", http_client_config={"verify": issuer.ssl_context}
    )
    scheme.openid_config.config_url = f"{issuer.url}/.well-known/openid-configuration"
    return serve(FastAPI(), scheme)


def authlib(issuer: Issuer) -> FastAPI:
    """As its documentation says: the keys are fetched once, by a client that blocks, and kept for ever."""
    import httpx2
    from authlib.oauth2 import OAuth2Error, ResourceProtector
    from authlib.oauth2.rfc9068 import JWTBearerTokenValidator
    from fastapi import HTTPException
    from joserfc.jwk import KeySet

    class Validator(JWTBearerTokenValidator):
        keys: KeySet | None = None

        def get_jwks(self) -> KeySet:
            if self.keys is None:
                self.keys = KeySet.import_key_set(httpx2.get(issuer.jwks_url, verify=issuer.ssl_context).json())
            return self.keys

    protector = ResourceProtector()
    protector.register_token_validator(Validator(issuer.url, AUDIENCE))

    async def caller(connection: HTTPConnection) -> Any:
        try:
            return protector.validate_request(None, connection)
        except OAuth2Error as error:
            raise HTTPException(error.status_code, error.error) from error

    return serve(FastAPI(), caller)


class Candidate(NamedTuple):
    """An app whose callers are known.

    Args:
        make: Returns it.
        without: Returns the same app without authentication.
        preset: Whose tokens it accepts.
        kinds: Requests that are measured.
        instead_of: The row of ours that does the same job.
    """

    make: Callable[[Issuer], FastAPI]
    without: Callable[[], FastAPI] = lambda: serve(FastAPI())
    preset: PresetName = "standard"
    kinds: Iterable[str] = tuple(STATUSES)
    instead_of: str = ""


CANDIDATES = {
    "Depends(nothing)": Candidate(lambda _: serve(FastAPI(), nothing), kinds=("known token",)),
    DEPENDENCY: Candidate(lambda issuer: serve(FastAPI(), auth_of(issuer).current_user)),
    "guard_routes": Candidate(guarded, indexed),
    WHOLE: Candidate(lambda issuer: serve(assembly(auth=auth_of(issuer))), lambda: serve(assembly())),
    "auth0-fastapi-api": Candidate(auth0, preset="auth0", instead_of=DEPENDENCY),
    "fastapi-azure-auth": Candidate(azure, preset="entra", instead_of=DEPENDENCY),
    "Authlib": Candidate(authlib, instead_of=DEPENDENCY),
}


def bearer(token: str) -> Request:
    return Request("GET", PATH, headers=((b"authorization", f"Bearer {token}".encode()),))


def requests(kind: str, issuer: Issuer) -> Iterator[Request]:
    """Yield requests of a kind without end."""

    def token() -> str:
        return issuer.token(roles=["admin"], scopes=["read"], nbf=int(time.time()))

    known = bearer(token())
    while True:
        if kind == "known token":
            yield known
        elif kind == "no token":
            yield Request("GET", PATH)
        else:
            signed, _, signature = token().rpartition(".")
            yield bearer(f"{signed}.{signature[::-1] if kind == 'forged token' else signature}")


def clients() -> Iterator[tuple[str, int]]:
    """Yield another address for each request."""
    for number in itertools.count():
        yield f"203.0.{number >> 8}.{number & 255}", 40000


async def time_requests(
    app: App, sent: list[Request], addresses: Iterator[tuple[str, int]], expected: tuple[int, ...]
) -> float:
    """Return CPU seconds per request."""
    start = time.process_time()
    answers = [await answer(app, request, client=next(addresses)) for request in sent]
    taken = (time.process_time() - start) / len(sent)
    for each in answers:
        if each.status not in expected:
            raise SystemExit(f"answered {each.status} instead of {expected}: {each.body.decode()}")
    return taken


async def measure(candidate: Candidate, rounds: int) -> dict[str, float | None]:
    """Return microseconds more than without authentication for each kind of request, and requests to the issuer."""
    with Issuer(candidate.preset, audience=AUDIENCE, algorithm="RS256") as issuer:
        without, with_auth = candidate.without(), candidate.make(issuer)
        addresses, cells = clients(), {f"{kind}, us": None for kind in STATUSES}
        for kind in candidate.kinds:
            source, base, own = requests(kind, issuer), [], []
            await time_requests(with_auth, [next(source)], addresses, STATUSES[kind])  # the first one fetches the keys
            for _ in range(rounds * UNSIGNED.get(kind, 1)):
                sent = list(itertools.islice(source, CALLS))
                base.append(await time_requests(without, sent, addresses, (200,)))
                own.append(await time_requests(with_auth, sent, addresses, STATUSES[kind]))
            cells[f"{kind}, us"] = (min(own) - min(base)) * 1e6
        return cells | {"requests": len(issuer.requests)}


def measure_named(name: str, rounds: int) -> dict[str, float | None]:
    with output():
        return asyncio.run(measure(CANDIDATES[name], rounds))


def costs(names: Iterable[str], rounds: int) -> Table:
    rows = {name: in_another_process(measure_named, name, rounds) for name in names}
    return Table(
        name="auth",
        title="Who calls",
        unit="CPU time more than the same app without authentication, and requests to the issuer",
        rows=rows,
        instead_of={name: CANDIDATES[name].instead_of for name in rows if CANDIDATES[name].instead_of in rows},
    )


def token_of_secret(subject: str = "alice", **claims: Any) -> str:
    import jwt

    return jwt.encode({"sub": subject, "exp": int(time.time()) + 3600, **claims}, SECRET, "HS256")


def whole_with_secret() -> FastAPI:
    return serve(assembly(auth=Auth(AuthSettings(secret=SECRET))))


async def remember(claims: dict[str, Any]) -> dict[str, float]:
    """Return how many tokens of many are known afterwards, and the memory that they take."""
    auth = Auth(AuthSettings(secret=SECRET))
    tokens = [token_of_secret(f"user-{number}", **claims) for number in range(SENT)]
    gc.collect()
    tracemalloc.start()
    for token in tokens:
        await auth.authenticate(HTTPConnection(scope_of(*bearer(token))))
    gc.collect()
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    known = sum(auth.known_user(scope_of(*bearer(token))) is not None for token in tokens)
    return {"sent": len(tokens), "known": known, "MB": taken / 1e6}


def remember_named(name: str) -> dict[str, float]:
    return asyncio.run(remember(TOKENS[name]))


def memory() -> Table:
    rows = {name: in_another_process(remember_named, name) for name in TOKENS}
    return Table("auth-memory", "Known tokens", "number, and memory of the cache", rows, higher=("known",))


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="rounds per kind of request")
    parser.add_argument("--apps", nargs="+", default=list(CANDIDATES), help="those of the table that are measured")
    options = parser.parse_args()

    show([costs(options.apps, options.rounds), memory()], options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
