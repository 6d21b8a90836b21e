"""Try the service in one step: `python -m service.demo`, or with the name of another database, see DATABASES.

It keeps an SQLite database in `.demo/` and fills it on the first run. It serves on 127.0.0.1 at the port PORT, or 8000.
Ctrl-C ends it.
"""

import asyncio
import contextlib
import os
import secrets  # fastapi-prodkit new: auth
import shlex  # fastapi-prodkit new: auth
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi_prodkit.database import Database

from service import load, migrate
from service.application import build
from service.config import ServiceSettings
from service.services.airports import any_loaded

DIRECTORY = Path(__file__).parents[1] / ".demo"

INVITATION = """
The airports service runs at {url}

  docs     {url}/docs
  health   {url}/health
  ready    {url}/ready
  metrics  {url}/metrics

Try, in another terminal:

  curl '{url}/v1/airports/fra'
  curl '{url}/v1/airports/nearest?lat=50.11&lon=8.68&limit=3'
{token}  curl '{url}/v1/reports' {header}-H 'Content-Type: application/json' \\
    -d '{{"airport": "FRA", "visited_on": "2025-05-04", "rating": 4, "comment": "Long walks, short queues."}}'

Ctrl-C ends it. Its data {whereabouts}.
"""
SECRET = DIRECTORY / "secret"  # fastapi-prodkit new: auth


def main() -> None:
    """Prepare the database, say what to try, and serve until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C at every stage, with exit code 0
    database = DATABASES[sys.argv[1] if len(sys.argv) > 1 else "sqlite"]
    with (
        contextlib.suppress(KeyboardInterrupt),
        listen(os.environ.get("PORT", "8000")) as listener,
        database() as (url, whereabouts),
    ):
        settings = ServiceSettings(
            environment="dev",
            service={"name": "airports-service"},
            database={"url": url},
            auth={"secret": shared_secret()},  # fastapi-prodkit new: auth
        )
        prepare(settings)
        host, port = listener.getsockname()
        print(invitation(f"http://{host}:{port}", whereabouts), flush=True)
        serve(settings, listener)


def invitation(url: str, whereabouts: str) -> str:
    """Return what to try."""
    token = header = ""
    # fastapi-prodkit new: auth
    command = f"{shlex.quote(sys.executable)} -m fastapi_prodkit token alice --role reporter"
    token = f"  TOKEN=$(AUTH_SECRET=$(cat {shlex.quote(str(SECRET))}) {command})\n"
    header = '-H "Authorization: Bearer $TOKEN" '
    # fastapi-prodkit new: end
    return INVITATION.format(url=url, whereabouts=whereabouts, token=token, header=header)


@contextlib.contextmanager
def sqlite() -> Iterator[tuple[str, str]]:
    """Yield the URL of a file, and a sentence about where the data is kept."""
    DIRECTORY.mkdir(exist_ok=True)
    yield f"sqlite:///{DIRECTORY / 'service.sqlite3'}", f"stays in {DIRECTORY}"


# fastapi-prodkit new: postgresql
@contextlib.contextmanager
def postgresql() -> Iterator[tuple[str, str]]:
    """Start a real PostgreSQL, which ends with the demo; yield its URL, and a sentence about where the data is kept."""
    from fastapi_prodkit.testing import postgres  # noqa: PLC0415 - it needs the extra `testing`

    print("Starting PostgreSQL ...", flush=True)
    with postgres() as server:
        yield server.url(), "is gone then"


# fastapi-prodkit new: end
DATABASES = {
    "sqlite": sqlite,
    "postgresql": postgresql,  # fastapi-prodkit new: postgresql
}


# fastapi-prodkit new: auth
def shared_secret() -> str:
    """Return the secret that signs the tokens of the demo. The first run makes it; only its owner may read the file."""
    DIRECTORY.mkdir(exist_ok=True)
    if not (SECRET.exists() and SECRET.read_text()):
        SECRET.touch(mode=0o600)
        SECRET.write_text(secrets.token_hex(32))
    return SECRET.read_text()


# fastapi-prodkit new: end
def listen(port: str) -> socket.socket:
    """Bind the port first, so that a port in use is reported at once."""
    try:
        return socket.create_server(("127.0.0.1", int(port)))
    except (ValueError, OverflowError):
        sys.exit(f"PORT must be a number from 0 to 65535, not {port!r}.")
    except OSError as error:
        sys.exit(f"Cannot listen on 127.0.0.1:{port}: {error.strerror}. Choose another port: PORT=8001")


def prepare(settings: ServiceSettings) -> None:
    """Migrate the database, and load the airports if the table is empty."""
    print("Migrating the database ...", flush=True)
    migrate.upgrade(settings)
    asyncio.run(load_once(settings))


async def load_once(settings: ServiceSettings) -> None:
    """Load the airports if the table is empty."""
    database = Database(settings.database)
    async with database.lifespan(None), database.session() as session:
        if not await any_loaded(session):
            await load.load(session)


def serve(settings: ServiceSettings, listener: socket.socket) -> None:
    """Serve until a signal."""
    config = uvicorn.Config(
        build(settings),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
