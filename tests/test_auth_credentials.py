"""Where credentials are read from: one header line, and nowhere else."""

import pytest

from fastapi_prodkit.auth.credentials import bearer_line, read_credentials
from fastapi_prodkit.auth.refusal import Refused

BOTH = ("bearer", "apikey")


def read(*lines, schemes=BOTH):
    found = read_credentials({"type": "http", "headers": [(b"host", b"x"), *lines]}, schemes)
    return found and (found.scheme, found.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ((b"authorization", b"Bearer abc"), ("bearer", b"abc")),
        ((b"authorization", b"bearer  abc "), ("bearer", b"abc")),
        ((b"authorization", b"BEARER a b"), ("bearer", b"a b")),  # which is no token
        ((b"authorization", b"Bearer"), ("bearer", b"")),
        ((b"authorization", b"ApiKey abc"), ("apikey", b"abc")),
        ((b"x-api-key", b"abc"), ("apikey", b"abc")),
        ((b"x-api-key", b""), ("apikey", b"")),
    ],
)
def test_credentials_are_read_from_a_header(line, expected):
    """Schemes are compared in any case of letters (RFC 9110 section 11.1)."""
    assert read(line) == expected


@pytest.mark.parametrize("value", [b"Basic YTpi", b"DPoP abc", b"Bearerabc", b"Digest x=y", b"", b"abc"])
def test_other_scheme_is_no_credentials(value):
    """The client gets the challenge without an error (RFC 6750 section 3.1)."""
    assert read((b"authorization", value)) is None


def test_request_without_credentials_has_none():
    """Cookies and other headers are not read."""
    assert read((b"cookie", b"access_token=abc"), (b"x-token", b"abc")) is None


@pytest.mark.parametrize(
    "lines",
    [
        [(b"authorization", b"Bearer a"), (b"authorization", b"Bearer a")],
        [(b"authorization", b"Basic a"), (b"authorization", b"Bearer a")],
        [(b"authorization", b"Bearer a"), (b"authorization", b"Basic a")],
        [(b"authorization", b"Bearer a"), (b"x-api-key", b"b")],
        [(b"x-api-key", b"b"), (b"authorization", b"ApiKey b")],
        [(b"x-api-key", b"b"), (b"x-api-key", b"b")],
    ],
)
def test_several_credentials_are_refused(lines):
    """A proxy in front may have checked another one."""
    with pytest.raises(Refused) as caught:
        read(*lines)

    assert caught.value.code == "several_credentials"
    assert not caught.value.is_forgery


def test_scheme_that_is_not_accepted_is_not_read():
    """AWS API Gateway has an X-API-Key of its own, which is none of ours if there are no keys."""
    lines = [(b"authorization", b"Bearer a"), (b"x-api-key", b"b")]

    assert read(*lines, schemes=("bearer",)) == ("bearer", b"a")
    assert read(*lines, schemes=("apikey",)) == ("apikey", b"b")


def test_bound_token_is_read_if_dpop_is_accepted():
    """Its proof has a line of its own, which is read later."""
    assert read((b"authorization", b"dpop  abc"), (b"dpop", b"x"), schemes=("bearer", "dpop")) == ("dpop", b"abc")


def test_bound_token_is_remembered_with_its_key():
    """By no line that any header could have."""
    found = read_credentials({"headers": [(b"authorization", b"DPoP abc")]}, ("dpop",))

    assert (found.line, found.bound_to("thumbprint").line) == (b"DPoP abc", b"thumbprint abc")


def test_token_is_remembered_with_its_scheme():
    """A value that was verified as an API key is unknown as a token; spelling makes no difference."""
    lines = [
        read_credentials({"headers": [line]}, BOTH).line
        for line in [
            (b"authorization", b"Bearer a"),
            (b"authorization", b"BEARER   a"),
            (b"authorization", b"ApiKey a"),
            (b"x-api-key", b"a"),
            (b"x-api-key", b"Bearer a"),
        ]
    ]

    assert lines == [b"Bearer a", b"Bearer a", b"ApiKey a", b"ApiKey a", b"ApiKey Bearer a"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([(b"authorization", b"Bearer a")], b"Bearer a"),
        ([(b"authorization", b"bearer a")], None),
        ([(b"authorization", b"ApiKey a")], None),
        ([(b"authorization", b"Basic a")], None),
        ([(b"x-api-key", b"Bearer a")], None),
        ([(b"authorization", b"Bearer a"), (b"authorization", b"Bearer a")], None),
        ([(b"authorization", b"Bearer a"), (b"x-api-key", b"b")], None),
        ([(b"x-api-key", b"b"), (b"authorization", b"Bearer a")], None),
        ([], None),
    ],
)
def test_line_of_a_bearer_token_is_that_of_the_only_credentials(lines, expected):
    """Whatever is not as usual is left to `read_credentials`, so that nothing is accepted that it refuses."""
    scope = {"headers": [(b"host", b"x"), *lines, (b"accept", b"*/*")]}

    line = bearer_line(scope)

    assert line == expected
    assert line is None or read_credentials(scope, BOTH).line == line
