"""Routes for all outcomes of a request that logs and metrics have to distinguish."""

from fastapi import APIRouter, BackgroundTasks
from fastapi.responses import RedirectResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response


def outcomes() -> APIRouter:
    """Return one route for each outcome."""
    router = APIRouter()

    @router.get("/ok/{number}")
    async def ok(number: int):
        return number

    @router.get("/sync/{number}")
    def sync(number: int):
        return number

    @router.post("/ok/{number}")
    async def create(number: int, body: dict[str, int]):
        return number

    @router.get("/empty", status_code=204)
    async def empty():
        return None

    @router.get("/unchanged")
    async def unchanged():
        return Response(status_code=304)

    @router.get("/elsewhere")
    async def elsewhere():
        return RedirectResponse("/ok/1")

    @router.get("/folder/")
    async def folder():
        return {}

    @router.get("/missing")
    async def missing():
        raise HTTPException(404)

    @router.get("/limited")
    async def limited():
        raise HTTPException(429)

    @router.get("/unavailable")
    async def unavailable():
        raise HTTPException(503)

    @router.get("/stream")
    async def stream():
        return StreamingResponse(iter([b"a", b"b"]))

    @router.get("/background")
    async def background(tasks: BackgroundTasks):
        tasks.add_task(lambda: None)
        return {}

    return router


def items() -> APIRouter:
    """Return the routes of a mounted app."""
    router = APIRouter()

    @router.get("/items/{number}")
    async def read(number: int):
        return number

    return router
