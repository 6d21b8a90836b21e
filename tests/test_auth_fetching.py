"""Fetching the keys of an issuer, from a real server with TLS: bounded in time and size, and never redirected."""

import asyncio
import json
import ssl
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

pytest.importorskip("jwt", reason="the extra auth is not installed")
pytest.importorskip("httpx2", reason="the extra auth is not installed")

from fastapi_prodkit.auth import fetching
from fastapi_prodkit.auth.fetching import Fetcher, FetchError
from fastapi_prodkit.testing import Issuer

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nothing; to read the system's certificates takes 20 ms


@pytest.fixture
def issuer():
    with Issuer() as issuer:
        yield issuer


@pytest.fixture
def failure():
    """Return the message with which the key set cannot be fetched."""

    async def failure(url, ssl_context=None, jwks_url=None):
        with pytest.raises(FetchError) as caught:
            await Fetcher(url, jwks_url, ssl_context).key_set()
        return str(caught.value)

    return failure


@contextmanager
def plain_server(answers):
    """Serve on loopback without TLS: path -> (status, headers, body)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers["accept-encoding"]))
            status, headers, body = answers.get(self.path, (404, {}, b""))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    seen = []
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.seen = seen
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def discovery(url, **changes):
    document = {"issuer": url, "jwks_uri": f"{url}/jwks", **changes}
    return 200, {}, json.dumps(document).encode()


async def test_keys_are_discovered(issuer):
    """By the URL in the issuer's discovery document."""
    document = await Fetcher(issuer.url, None, issuer.ssl_context).key_set()

    assert [key["kid"] for key in document.content["keys"]] == [issuer.key_id]
    assert document.max_age is None
    assert issuer.requests == ["/.well-known/openid-configuration", "/jwks"]


@pytest.mark.parametrize(("named", "found"), [("https://x.example/token", "https://x.example/token"), (7, None)])
async def test_token_endpoint_is_discovered(named, found):
    """For the page with the API docs; without a usable one, tokens are verified all the same."""
    answers = {"/jwks": (200, {}, b'{"keys": []}')}
    with plain_server(answers) as (_, url):
        answers["/.well-known/openid-configuration"] = discovery(url, token_endpoint=named)
        fetcher = Fetcher(url, None, NO_TLS)
        await fetcher.key_set()

    assert fetcher.token_endpoint == found


async def test_url_of_the_keys_can_be_given(issuer):
    """With AUTH_JWKS_URL nothing is discovered."""
    document = await Fetcher(issuer.url, f"{issuer.url}/jwks", issuer.ssl_context).key_set()

    assert document.content["keys"]
    assert issuer.requests == ["/jwks"]


async def test_max_age_is_returned():
    """Of the key set, not of the discovery document."""
    with Issuer(max_age=900) as issuer:
        document = await Fetcher(issuer.url, None, issuer.ssl_context).key_set()

    assert document.max_age == 900


async def test_certificate_of_another_authority_is_refused(issuer, failure):
    """Without the issuer's certificate among the trusted ones, and with another issuer's."""
    with Issuer() as other:
        messages = [await failure(issuer.url), await failure(issuer.url, other.ssl_context)]

    assert all("CERTIFICATE_VERIFY_FAILED" in message for message in messages)
    assert issuer.requests == []


async def test_certificate_for_another_host_is_refused(issuer, failure):
    """It is for 127.0.0.1."""
    url = issuer.url.replace("127.0.0.1", "localhost")

    assert "CERTIFICATE_VERIFY_FAILED" in await failure(url, issuer.ssl_context)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("refused", "cannot be reached"),
        ("garbage", "/.well-known/openid-configuration is not JSON"),
        ("error", "/.well-known/openid-configuration answered 500"),
    ],
)
async def test_fault_is_named(fault, message, issuer, failure):
    """With the URL, for the log."""
    with issuer.fault(fault):
        assert message in await failure(issuer.url, issuer.ssl_context)

    assert await Fetcher(issuer.url, None, issuer.ssl_context).key_set()


@pytest.mark.parametrize("fault", ["silent", "slow"])
async def test_time_is_bounded(fault, issuer, failure, monkeypatch):
    """For everything together: a server that sends a byte now and then does not get more."""
    monkeypatch.setattr(fetching, "TIMEOUT", 0.15)
    started = asyncio.get_running_loop().time()

    with issuer.fault(fault):
        message = await failure(issuer.url, issuer.ssl_context)

    assert message == f"{issuer.url} did not answer within 0.15 s"
    assert asyncio.get_running_loop().time() - started < 2


async def test_size_is_bounded(failure):
    """256 KiB, which is enough for a thousand keys; compression is not asked for."""
    with plain_server({"/keys": (200, {}, b" " * 262_145), "/fits": (200, {}, b" " * 262_141 + b"{}\n")}) as (
        server,
        url,
    ):
        message = await failure(url, NO_TLS, jwks_url=f"{url}/keys")
        document = await Fetcher(url, f"{url}/fits", NO_TLS).key_set()

    assert message == f"{url}/keys has more than 262144 bytes"
    assert document.content == {}
    assert server.seen == [("/keys", "identity"), ("/fits", "identity")]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirect_is_not_followed(status, failure):
    """It is an error like any other status."""
    path = "/.well-known/openid-configuration"
    with plain_server({path: (status, {"Location": "/elsewhere"}, b"")}) as (server, url):
        message = await failure(url, NO_TLS)

    assert message == f"{url}{path} answered {status}"
    assert [path for path, _ in server.seen] == [path]


@pytest.mark.parametrize("named", ["https://login.example.com", None, "{url}/", "{url}#"])
async def test_discovery_document_of_another_issuer_is_refused(named, failure):
    """OpenID Connect Discovery section 4.3: exactly the same, a slash at the end included."""
    answers = {}
    with plain_server(answers) as (_, url):
        answers["/.well-known/openid-configuration"] = discovery(url, issuer=named and named.format(url=url))
        message = await failure(url, NO_TLS)

    assert message.endswith(
        f"names {named and named.format(url=url)} as its issuer, and AUTH_ISSUER must be exactly that"
    )


@pytest.mark.parametrize("body", [b"[]", b"null", b'"text"'])
async def test_discovery_document_that_is_no_object_is_refused(body, failure):
    """It names no issuer."""
    with plain_server({"/.well-known/openid-configuration": (200, {}, body)}) as (_, url):
        assert "names None as its issuer" in await failure(url, NO_TLS)


@pytest.mark.parametrize(
    "keys", [None, 1, "", "/jwks", "ftp://127.0.0.1/jwks", "http://login.example.com/jwks", "https://user@host/jwks"]
)
async def test_url_of_the_keys_without_tls_is_refused(keys, failure):
    """Http is for an issuer on this machine, and its keys on this machine."""
    answers = {}
    with plain_server(answers) as (_, url):
        answers["/.well-known/openid-configuration"] = discovery(url, jwks_uri=keys)
        message = await failure(url, NO_TLS)

    assert message.endswith("has no jwks_uri with https")


async def test_keys_of_an_https_issuer_have_https(issuer, failure):
    """Even on this machine."""
    issuer.jwks_url = "http://127.0.0.1/jwks"

    assert "has no jwks_uri with https" in await failure(issuer.url, issuer.ssl_context)


async def test_issuer_without_tls_on_this_machine_is_fetched():
    """For development."""
    answers = {"/jwks": (200, {"Cache-Control": "max-age=60"}, b'{"keys": []}')}
    with plain_server(answers) as (_, url):
        answers["/.well-known/openid-configuration"] = discovery(url)
        document = await Fetcher(url, None, NO_TLS).key_set()

    assert document == ({"keys": []}, 60.0)


async def test_host_that_does_not_exist_is_an_error(failure):
    """As every name that does not resolve."""
    assert "cannot be reached" in await failure("https://login.invalid")
