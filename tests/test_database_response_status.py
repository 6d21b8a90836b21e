"""The status of the response decides whether a session commits."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.exceptions import ResponseValidationError
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_prodkit.sections import DatabaseSettings

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("aiosqlite", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_prodkit.database import Database, ReadSessionDep, SessionDep, get_read_session, get_session
from fastapi_prodkit.exceptions import ConfigurationError

INSERT = text("INSERT INTO items VALUES (:name)")


class ConflictResponse(JSONResponse):
    def __init__(self, content: Any, status_code: int = 409, **others: Any) -> None:
        super().__init__(content, status_code, **others)


class PlainResponse(JSONResponse):
    def __init__(self, content: Any, **others: Any) -> None:
        super().__init__(content, **others)


class Refused(Exception): ...  # noqa: N818 - not an error: it may be answered with a success


class ForgivingRoute(APIRoute):
    """Answer an exception of the handler, so that it never reaches the dependencies."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def forgive(request: Request) -> Response:
            try:
                return await handler(request)
            except Refused:
                return JSONResponse("forgiven")

        return forgive


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(DatabaseSettings(url=f"sqlite:///{tmp_path}/test.db"))
    async with database.lifespan(None):
        async with database.session() as session:
            await session.execute(text("CREATE TABLE items (name text PRIMARY KEY)"))
        yield database


@pytest.fixture
def app(database: Database) -> FastAPI:
    app = FastAPI()
    app.state.database = database
    return app


async def insert(request: Request, session: SessionDep) -> None:
    await session.execute(INSERT, {"name": request.url.path.strip("/")})


async def insert_status(status: int, session: SessionDep) -> None:
    await session.execute(INSERT, {"name": str(status)})


def client_of(app: ASGIApp) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


async def stored(database: Database) -> list[str]:
    async with database.session() as session:
        return list(await session.scalars(text("SELECT name FROM items ORDER BY name")))


def returned(status: int) -> Response:
    return JSONResponse({}, status)


def injected(response: Response, status: int) -> None:
    response.status_code = status


def both(response: Response, status: int) -> Response:
    response.status_code = 709 - status  # which does not count
    return JSONResponse({}, status)


def streamed(status: int) -> Response:
    return StreamingResponse(iter([b"a", b"b"]), status)


def redirected(status: int) -> Response:
    return RedirectResponse("/elsewhere", status)


async def returned_later(status: int) -> Response:
    await asyncio.sleep(0)
    return JSONResponse({}, status)


class CallableEndpoint:
    async def __call__(self, status: int) -> Response:
        return JSONResponse({}, status)


HANDLERS: dict[str, Callable[..., Any]] = {
    "returned": returned,
    "injected": injected,
    "both": both,
    "streamed": streamed,
    "redirected": redirected,
    "later": returned_later,
    "callable": CallableEndpoint(),
    "partial": functools.partial(returned_later),
}


@pytest.mark.parametrize("name", HANDLERS)
async def test_status_below_400_commits(app: FastAPI, database: Database, name: str) -> None:
    """Returned or injected, in sync and async handlers."""
    app.add_api_route("/", HANDLERS[name], methods=["POST"], dependencies=[Depends(insert_status)])
    statuses = [409, 201, 500, 303, 404]

    async with client_of(app) as client:
        answers = [await client.post("/", params={"status": status}) for status in statuses]

    assert [answer.status_code for answer in answers] == statuses
    assert await stored(database) == ["201", "303"]


@pytest.mark.parametrize(
    ("declared", "status"),
    [
        ({"status_code": 409}, 409),
        ({"status_code": 201}, 201),
        ({"response_class": ConflictResponse}, 409),
        ({"response_class": ConflictResponse, "status_code": 201}, 201),
        ({"response_class": PlainResponse}, 200),
        ({"response_class": StreamingResponse, "status_code": 409}, 409),
        ({}, 200),
    ],
)
async def test_declared_status_decides(app: FastAPI, database: Database, declared: dict[str, Any], status: int) -> None:
    """Of the decorator, or of the response class."""

    @app.post("/declared", dependencies=[Depends(insert)], response_model=None, **declared)
    def create() -> Any:
        return b"" if "response_class" in declared and declared["response_class"] is StreamingResponse else {}

    async with client_of(app) as client:
        answer = await client.post("/declared")

    assert answer.status_code == status
    assert await stored(database) == (["declared"] if status < 400 else [])


async def test_injected_status_wins_over_the_declared_one(app: FastAPI, database: Database) -> None:
    """A session commits if the handler sets 201 on the injected Response of a route declared with 409."""

    @app.post("/changed", status_code=409, dependencies=[Depends(insert)])
    def create(response: Response) -> None:
        response.status_code = 201

    async with client_of(app) as client:
        answer = await client.post("/changed")

    assert answer.status_code == 201
    assert await stored(database) == ["changed"]


async def test_generator_has_the_declared_status(app: FastAPI, database: Database) -> None:
    """Its session ends before the first item."""

    @app.get("/items", dependencies=[Depends(insert)])
    def items() -> Iterator[int]:
        yield 1

    @app.get("/refused", dependencies=[Depends(insert)], status_code=409)
    async def refused() -> AsyncIterator[list[str]]:
        yield await stored(database)

    async with client_of(app) as client:
        answers = [await client.get(path) for path in ("/items", "/refused")]

    assert [answer.text for answer in answers] == ["1\n", '["items"]\n']
    assert [answer.status_code for answer in answers] == [200, 409]
    assert await stored(database) == ["items"]


async def test_exception_rolls_back_whatever_its_status(app: FastAPI, database: Database) -> None:
    """Even if an exception handler answers with success."""
    app.router.route_class = ForgivingRoute
    app.add_exception_handler(KeyError, lambda _request, _error: JSONResponse("accepted", 202))

    @app.post("/accepted", dependencies=[Depends(insert)])
    async def accepted() -> None:
        raise KeyError

    @app.post("/forgiven", dependencies=[Depends(insert)])
    async def forgiven() -> None:
        raise Refused

    @app.post("/forgiven-sync", dependencies=[Depends(insert)])
    def forgiven_sync() -> None:
        raise Refused

    @app.post("/raised", dependencies=[Depends(insert)])
    def raised() -> None:
        raise HTTPException(200)

    async with client_of(app) as client:
        paths = ("/accepted", "/forgiven", "/forgiven-sync", "/raised")
        statuses = [(await client.post(path)).status_code for path in paths]

    assert statuses == [202, 200, 200, 200]
    assert await stored(database) == []


async def suppress(session: SessionDep) -> AsyncIterator[None]:
    with contextlib.suppress(Exception):
        yield


async def insert_and_fail(
    request: Request, session: SessionDep, _: Annotated[None, Depends(suppress, scope="function")]
) -> None:
    await insert(request, session)
    raise KeyError


async def test_suppressed_exception_rolls_back(app: FastAPI, database: Database) -> None:
    """An exception that a dependency suppresses is no success: FastAPI answers 500, and nothing is saved."""
    suppressing = Depends(suppress, scope="function")

    @app.post("/handler", dependencies=[suppressing, Depends(insert)])
    def fail() -> None:
        raise KeyError

    @app.post("/dependency", dependencies=[Depends(insert_and_fail)])
    async def never_called() -> None: ...

    @app.post("/model", dependencies=[suppressing, Depends(insert)], response_model=int)
    async def not_an_integer() -> str:
        return "one"

    async with client_of(app) as client:
        statuses = [(await client.post(path)).status_code for path in ("/handler", "/dependency", "/model")]

    assert statuses == [500] * 3
    assert await stored(database) == []


async def test_request_during_the_handling_of_an_exception_is_committed(app: FastAPI, database: Database) -> None:
    """An exception that is handled around the whole request has nothing to do with it."""

    @app.post("/repeated", dependencies=[Depends(insert)])
    async def create() -> None: ...

    async def repeat(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            raise KeyError
        except KeyError:
            await app(scope, receive, send)

    async with client_of(repeat) as client:
        answer = await client.post("/repeated")

    assert answer.status_code == 200
    assert await stored(database) == ["repeated"]


async def repository(session: Annotated[AsyncSession, Depends(get_session)]) -> AsyncSession:
    return session


@pytest.mark.parametrize("late", [get_session, get_read_session, repository])
async def test_session_that_would_end_after_the_response_is_refused(
    app: FastAPI, database: Database, late: Callable[..., Any]
) -> None:
    """FastAPI's default for a dependency with `yield` would commit after the response."""
    session_of = Depends(late)

    @app.post("/items", dependencies=[Depends(insert)])
    async def create(session: AsyncSession = session_of) -> None: ...

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
        for _ in range(2):
            with pytest.raises(ConfigurationError, match=r"would commit after the response has left: add scope="):
                await client.post("/items")

    assert await stored(database) == []


async def test_session_closed_by_the_handler_must_be_committed(app: FastAPI, database: Database) -> None:
    """Uncommitted work is an error."""

    @app.post("/committed")
    async def committed(session: SessionDep) -> None:
        await session.execute(INSERT, {"name": "a"})
        await session.commit()
        await session.close()

    @app.post("/lost")
    async def lost(session: SessionDep) -> None:
        await session.execute(INSERT, {"name": "b"})
        await session.close()
        await session.close()

    @app.post("/read")
    async def read(session: ReadSessionDep) -> None:
        await session.execute(text("SELECT 1"))
        await session.close()

    async with client_of(app) as client:
        statuses = [(await client.post(path)).status_code for path in ("/committed", "/lost", "/read")]

    assert statuses == [200, 500, 200]
    assert await stored(database) == ["a"]


async def test_commit_in_the_handler_stays(app: FastAPI, database: Database) -> None:
    """With any status; later work is rolled back."""

    @app.post("/orders")
    async def create(session: SessionDep) -> Response:
        await session.execute(INSERT, {"name": "attempt"})
        await session.commit()
        await session.execute(INSERT, {"name": "order"})
        return JSONResponse({}, 402)

    async with client_of(app) as client:
        await client.post("/orders")

    assert await stored(database) == ["attempt"]


async def test_status_of_included_and_mounted_routes_decides(app: FastAPI, database: Database) -> None:
    """Routes in nested routers, repeated routers and mounted apps each commit or roll back by their status."""
    inner, outer, mounted = APIRouter(), APIRouter(prefix="/outer"), FastAPI()

    @inner.post("/refused", dependencies=[Depends(insert)])
    @mounted.post("/refused", dependencies=[Depends(insert)])
    async def refused() -> Response:
        return JSONResponse({}, 409)

    @inner.post("/created", dependencies=[Depends(insert)])
    @mounted.post("/created", dependencies=[Depends(insert)])
    async def created() -> Response:
        return JSONResponse({}, 201)

    outer.include_router(inner, prefix="/inner")
    app.include_router(outer)
    app.include_router(inner, prefix="/again")
    mounted.state.database = database
    app.mount("/mounted", mounted)
    places = ["outer/inner", "again", "mounted"]

    async with client_of(app) as client:
        statuses = [
            [(await client.post(f"/{place}/{path}")).status_code for path in ("refused", "created")] for place in places
        ]

    assert statuses == [[409, 201]] * 3
    assert await stored(database) == sorted(f"{place}/created" for place in places)


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_concurrent_requests_have_separate_statuses(app: FastAPI, database: Database, kind: str) -> None:
    """Concurrent requests to one route commit or roll back independently, each by its response status."""

    async def insert_by_number(number: int, session: SessionDep) -> None:
        await session.execute(INSERT, {"name": str(number)})

    async def later(number: int) -> Response:
        await asyncio.sleep(0)
        return returned(409 if number % 2 else 201)

    def at_once(number: int) -> Response:
        return returned(409 if number % 2 else 201)

    app.add_api_route(
        "/", later if kind == "async" else at_once, methods=["POST"], dependencies=[Depends(insert_by_number)]
    )

    async with client_of(app) as client:
        await asyncio.gather(*[client.post("/", params={"number": number}) for number in range(8)])

    assert await stored(database) == [str(number) for number in range(0, 8, 2)]


async def test_status_decides_for_every_session(app: FastAPI, database: Database) -> None:
    """Also for one in a dependency."""
    Session = Annotated[AsyncSession, Depends(get_session, scope="function", use_cache=False)]  # noqa: N806 - a type

    @app.post("/")
    async def create(first: SessionDep, second: Session, reading: ReadSessionDep, status: int) -> Response:
        assert first is not second
        await reading.execute(text("SELECT 1"))
        await second.execute(INSERT, {"name": "second"})
        return JSONResponse({}, status)

    async with client_of(app) as client:
        refused = await client.post("/", params={"status": 409})
        after_refusal = await stored(database)
        await client.post("/", params={"status": 201})

    assert refused.status_code == 409
    assert after_refusal == []
    assert await stored(database) == ["second"]


async def test_in_process_request_has_its_own_status(app: FastAPI, database: Database) -> None:
    """A 409 from an in-process call to the app does not roll back the session of the calling handler."""

    @app.post("/inner", dependencies=[Depends(insert)])
    async def inner() -> Response:
        return JSONResponse({}, 409)

    @app.post("/outer")
    async def outer(request: Request, session: SessionDep) -> None:
        async with client_of(app) as client:
            await client.post("/inner")
        await insert(request, session)

    async with client_of(app) as client:
        answer = await client.post("/outer")

    assert answer.status_code == 200
    assert await stored(database) == ["outer"]


def test_websocket_commits_without_a_status(tmp_path: Path) -> None:
    """Unless it ends with an exception."""
    database = Database(DatabaseSettings(url=f"sqlite:///{tmp_path}/test.db"))
    app = FastAPI(lifespan=database.lifespan)
    app.state.database = database

    @app.websocket("/")
    async def serve(websocket: WebSocket, session: SessionDep) -> None:
        await websocket.accept()
        await websocket.send_json((await session.execute(text("SELECT 1"))).scalar_one())
        await websocket.close()

    with TestClient(app) as client, client.websocket_connect("/") as websocket:
        assert websocket.receive_json() == 1


async def test_session_outside_of_a_route_uses_the_passed_response(app: FastAPI, database: Database) -> None:
    """get_session called without a route commits or rolls back by the Response that the caller passes."""
    async for session in get_session(Request({"type": "http", "app": app, "headers": []}), Response()):
        await session.execute(INSERT, {"name": "hammer"})

    assert await stored(database) == ["hammer"]


async def test_private_parts_of_fastapi_are_unchanged(app: FastAPI) -> None:
    """FastAPI's validation errors still name the handler and its file after the response status is exposed."""

    @app.get("/", dependencies=[Depends(insert)])
    async def broken() -> int:
        return "not a number"  # type: ignore[return-value]  # on purpose

    errors = []
    for _ in range(2):
        with pytest.raises(ResponseValidationError) as caught:
            await httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test").get("/")
        errors.append(str(caught.value))

    assert errors[0] == errors[1]
    assert f'File "{__file__}"' in errors[1]
    assert ", in broken" in errors[1]
