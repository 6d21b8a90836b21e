"""An app with a middleware, an error handler and a lifespan of its own, to which `install` adds everything:
`uvicorn installed:app`.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from fastapi_prodkit import Settings, install


class OutOfStockError(Exception):
    """The warehouse has fewer items than were ordered."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.stock = {"apples": 3}
    yield
    app.state.stock.clear()


app = FastAPI(title="Orders", lifespan=lifespan, docs_url=None, redoc_url=None)


@app.middleware("http")
async def add_region(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    response = await call_next(request)
    response.headers["X-Region"] = "eu"
    return response


@app.exception_handler(OutOfStockError)
async def out_of_stock(request: Request, error: OutOfStockError) -> JSONResponse:  # noqa: ARG001 - FastAPI's signature
    return JSONResponse({"error": "out of stock"}, status_code=409)


@app.post("/orders/{article}")
async def order(article: str, request: Request) -> dict[str, int]:
    if request.app.state.stock.get(article, 0) == 0:
        raise OutOfStockError
    request.app.state.stock[article] -= 1
    return {"left": request.app.state.stock[article]}


install(app, Settings(service={"name": "orders"}))
