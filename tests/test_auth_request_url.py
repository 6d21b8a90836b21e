"""Whether the URL in a DPoP proof is that of the request."""

import pytest

from fastapi_prodkit.auth.request_url import is_url_of


def request(path="/a/b", *, host=b"api.example.com", scheme="https", root="", **more):
    hosts = host if isinstance(host, list) else [host]
    headers = [(b"host", each) for each in hosts]
    return {"type": "http", "scheme": scheme, "path": path, "root_path": root, "headers": headers, **more}


EQUAL = [
    "https://api.example.com/a/b",
    "https://api.example.com/a/b?x=1",
    "https://api.example.com/a/b#part",
    "https://api.example.com/a/b?x=1#part",
    "HTTPS://API.example.COM/a/b",
    "https://api.example.com:443/a/b",
    "https://api.example.com:/a/b",
    "https://api.example.com:0443/a/b",
    "https://api.example.com/%61/b",
    "https://api.example.com/x/../a/./b",
    "https://api.example.com/../a/b",
    "https://api.example.com/x/%2e%2E/a/b",
]


@pytest.mark.parametrize("url", EQUAL)
def test_url_is_that_of_the_request(url):
    """RFC 9449 section 4.3, RFC 3986 sections 6.2.2 and 6.2.3."""
    assert is_url_of(request(), url)


OTHER = [
    "",
    "/a/b",
    "//api.example.com/a/b",
    "api.example.com/a/b",
    "http://api.example.com/a/b",
    "http://api.example.com:443/a/b",
    "ftp://api.example.com/a/b",
    "https://api.example.com",
    "https://api.example.com/",
    "https://api.example.com/a",
    "https://api.example.com/a/b/",
    "https://api.example.com/A/b",
    "https://api.example.com//a/b",
    "https://api.example.com/a//b",
    "https://api.example.com/a%2Fb",
    "https://api.example.com/a/b%20",
    "https://api.example.com/a/b ",
    " https://api.example.com/a/b",
    "https://api.example.com/a/b\n",
    "https://api.example.com/a\t/b",
    "https://api.example.com/a/b/..",
    "https://api.example.com/a/b/.",
    "https://api.example.com:8443/a/b",
    "https://api.example.com:99999999999999999999/a/b",
    "https://api.example.com.evil.example/a/b",
    "https://evil.example/api.example.com/a/b",
    "https://user@api.example.com/a/b",
    "https://api.example.com@evil.example/a/b",
    "https://api.example.com\\a\\b",
    "https:\\\\api.example.com/a/b",
    "https:///a/b",
    "https://api.example.com/a/b\u0131",
    "https://api.example.com/\ud800",
    "https://\u24d0pi.example.com/a/b",
    "https://*/a/b",
    "*",
]


@pytest.mark.parametrize("url", OTHER)
def test_other_url_is_not(url):
    """A proof for another resource, or one that two parsers would read differently."""
    assert not is_url_of(request(), url)


@pytest.mark.parametrize(
    ("scope", "url"),
    [
        (request(scheme="http"), "http://api.example.com/a/b"),
        (request(scheme="http", host=b"API.example.com:80"), "http://api.example.com/a/b"),
        (request(scheme="http", host=b"api.example.com:8000"), "http://api.example.com:8000/a/b"),
        (request(host=b"[::1]:8443"), "https://[::1]:8443/a/b"),
        (request(host=b"[2001:DB8::1]"), "https://[2001:db8::1]/a/b"),
        (request(host=b"localhost"), "https://LOCALHOST/a/b"),
        (request("/"), "https://api.example.com"),
        (request("/"), "https://api.example.com?x=1"),
        (request("/a b/\u00fc"), "https://api.example.com/a%20b/%c3%BC"),
        (request("/x", raw_path=b"/a%2fb%7E"), "https://api.example.com/a%2Fb~"),
        (request("/x", raw_path=b"/x?y=1"), "https://api.example.com/x"),
        (request(scheme="wss"), "https://api.example.com/a/b"),
        (request(scheme="ws"), "http://api.example.com/a/b"),
        ({"headers": [(b"host", b"a")], "path": "/", "type": "http"}, "http://a/"),
        # Behind a proxy that removes a prefix, one that does not, and in a mounted app.
        (request("/a", root="/v1"), "https://api.example.com/v1/a"),
        (request("/v1/a", root="/v1"), "https://api.example.com/v1/a"),
        (request("/v1", root="/v1/"), "https://api.example.com/v1"),
        (request("/v10/a", root="/v1"), "https://api.example.com/v1/v10/a"),
        (request("/sub/a", root="/sub", app_root_path=""), "https://api.example.com/sub/a"),
        (request("/sub/a", root="/v1/sub", app_root_path="/v1"), "https://api.example.com/v1/sub/a"),
    ],
)
def test_url_is_the_one_that_the_client_sees(scope, url):
    """With the host and the path as they were sent, and what a proxy has removed."""
    assert is_url_of(scope, url)


@pytest.mark.parametrize(
    "scope",
    [
        request(host=[]),
        request(host=[b"api.example.com", b"api.example.com"]),
        request(host=[b"evil.example", b"api.example.com"]),
        request(host=b""),
        request("/b", host=b"api.example.com/a"),  # the proof of a request to what is below /a of this host
        request(host=b"api.example.com\xff"),
        request(host=b"user@api.example.com"),
        request(scheme="gopher"),
        request("/x/../a/b", raw_path=b"/x/../a/b"),  # the router of the app would not resolve it
        request("/x/../a/b", raw_path=b"/x/%2e%2e/a/b"),
        request("/a/b", raw_path=b"/a/b/."),
        request("/a/b", raw_path=b"/a/\xff"),
        request("a/b"),
    ],
)
@pytest.mark.parametrize("url", ["https://api.example.com/a/b", "https://api.example.com/x/../a/b", "https:///a/b"])
def test_request_whose_url_is_not_certain_has_no_proof(scope, url):
    """What cannot be compared is refused."""
    assert not is_url_of(scope, url)
