"""A small service, made in three ways, with an agent attached at some moment; and what the agent has sent in the end.

Runs in a process of its own, because agents patch the framework's classes for good.
"""

import http.client
import importlib.util
import json
import os
from pathlib import Path

from sink import listening
from wire import serving

# Two routes that raise, because an agent may report both under one name.
PATHS = ("/items/1", "/items/x", "/gone", "/nowhere", "/stream", "/broken", "/broken-too")
STATUSES = [200, 422, 404, 404, 200, 500, 500]


def main(agent, way, moment, result):
    """Serve, and write the effects that the agent's module reads, as JSON."""
    spec = importlib.util.spec_from_file_location("agent", agent)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with listening() as sink:
        os.environ |= {name: value.format(url=sink.url) for name, value in getattr(module, "ENVIRONMENT", {}).items()}
        answered = statuses(assemble(way, moment, lambda app: module.attach(app, sink)))
        assert answered == STATUSES, answered
        Path(result).write_text(json.dumps(module.effects(sink)))


def assemble(way, moment, attach):
    """Return what to serve, with the agent attached before the app is made, while it is new, or once it is complete."""
    if moment == "before":
        attach(None)
    app = make(way)
    if moment == "new":
        attach(app)
    add_routes(app)
    if way == "install":
        from fastapi_prodkit import install

        install(app)
    return (attach(app) if moment == "complete" else None) or app


def make(way):
    """Return an app without routes of its own; `install` comes later."""
    if way == "create_app":
        from fastapi_prodkit import create_app

        return create_app()
    import fastapi  # its attribute, which agents replace

    return fastapi.FastAPI()


def add_routes(app):
    from fastapi import HTTPException
    from fastapi.responses import StreamingResponse

    @app.get("/items/{number}")
    async def read_item(number: int):
        return number

    @app.get("/gone")
    def gone():
        raise HTTPException(404)

    @app.get("/stream")
    async def stream():
        return StreamingResponse(iter([b"a", b"b"]))

    @app.get("/broken")
    async def broken():
        raise RuntimeError("boom")

    @app.get("/broken-too")
    def broken_too():
        raise ValueError("bang")


def statuses(app):
    """Serve the app, send it each request, and return the statuses."""
    with serving(app) as port:
        return [_status(port, path) for path in PATHS]


def _status(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()
