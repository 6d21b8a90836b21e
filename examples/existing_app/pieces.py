"""An app that exists already and takes three single pieces: `uvicorn pieces:app`.

It needs no settings, and nothing else about the app changes.
"""

from fastapi import FastAPI

from fastapi_prodkit.health import health_router
from fastapi_prodkit.request_id import RequestIDMiddleware, current_request_id
from fastapi_prodkit.security_headers import SecurityHeadersMiddleware

app = FastAPI(title="Orders", docs_url=None, redoc_url=None)


async def stock_is_reachable() -> None:
    """Query what the app depends on; raise if it does not answer."""


app.include_router(health_router(checks={"stock": stock_is_reachable}))
app.add_middleware(SecurityHeadersMiddleware)
app.add_middleware(RequestIDMiddleware)  # added last, so it is outermost


@app.get("/orders/{order_id}")
async def get_order(order_id: int) -> dict[str, int | str | None]:
    return {"order_id": order_id, "request_id": current_request_id()}
