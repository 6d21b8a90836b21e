"""mcp: its documented pattern runs the session manager in the parent's lifespan, and the manager runs once."""

from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from mcp.server.mcpserver import MCPServer

from fastapi_prodkit import Settings, create_app, install
from fastapi_prodkit.exceptions import ConfigurationError

URL = "http://127.0.0.1:8000"
CALL = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "double", "arguments": {"number": 21}}}


def service(way, **keywords):
    """Return an app with a mounted tool, whose lifespan runs the session manager."""
    server = MCPServer("service")

    @server.tool()
    def double(number: int) -> int:
        return 2 * number

    @asynccontextmanager
    async def lifespan(_app):
        async with server.session_manager.run():
            yield

    settings = Settings(environment="dev", log=None)
    is_created = way == "create_app"
    app = create_app(settings, lifespan=lifespan, **keywords) if is_created else FastAPI(lifespan=lifespan)
    app.mount("/", server.streamable_http_app(stateless_http=True, json_response=True))
    if way == "install":
        install(app, settings, **keywords)
    return app


def test_mcp_tools_answer(way):
    """With `mounted_lifespans=False`, only the parent's lifespan runs the session manager."""
    keywords = {} if way == "bare" else {"mounted_lifespans": False}

    with TestClient(service(way, **keywords), base_url=URL) as client:
        answer = client.post("/mcp", json=CALL, headers={"accept": "application/json"})

    assert answer.status_code == 200, answer.text
    assert answer.json()["result"]["structuredContent"] == {"result": 42}


@pytest.mark.parametrize("made", ["create_app", "install"])
def test_mcp_started_twice_is_an_error_with_the_keyword(made):
    """Without `mounted_lifespans=False`, the error names the path of the mount and that keyword."""
    with pytest.raises(ExceptionGroup) as caught, TestClient(service(made), base_url=URL):  # mcp's task group
        pass

    (error,) = caught.value.exceptions
    assert isinstance(error, ConfigurationError)
    assert "mounted at /" in str(error)
    assert "mounted_lifespans=False" in str(error)
