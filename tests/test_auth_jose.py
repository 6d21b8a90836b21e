"""Parsing of tokens: there is one way to write a token, and every other one is refused."""

import json

import pytest
from forging import base64url, claims, encoded, token

from fastapi_prodkit.auth.jose import LONGEST_TOKEN, is_text, parse
from fastapi_prodkit.auth.refusal import Refused

HEADER = {"alg": "RS256", "kid": "k1", "typ": "at+jwt"}


@pytest.fixture
def refused():
    """Return the code and the text with which a token is refused."""

    def refused(sent):
        with pytest.raises(Refused) as caught:
            parse(sent)
        return caught.value.code, caught.value.text

    return refused


def test_parts_of_a_token_are_returned():
    """Header, claims, the bytes that are signed, and the signature."""
    sent = token(HEADER, {"sub": "alice"})

    parsed = parse(sent)

    assert parsed == ("RS256", "k1", "at+jwt", {"sub": "alice"}, sent[: sent.rindex(b".")], b"signature", None)


@pytest.mark.parametrize(
    ("typ", "read"), [("JWT", "jwt"), ("application/at+jwt", "at+jwt"), ("AT+JWT", "at+jwt"), (None, "")]
)
def test_type_is_compared_in_lower_case(typ, read):
    """RFC 7515 section 4.1.9: a media type, whose `application/` may be left out."""
    header = {"alg": "RS256"} if typ is None else {"alg": "RS256", "typ": typ}

    assert parse(token(header, {})).type == read


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"a",
        b"a.b",
        b"a.b.c.d",
        b"..",
        encoded(HEADER) + b"." + encoded({}) + b".",
        b".".join([encoded(HEADER)] * 5),
        token(HEADER, {}) + b"=",
        token(HEADER, {}) + b"\n",
        b" " + token(HEADER, {}),
        token(HEADER, {}).replace(b".", b"=.", 1),
        encoded(HEADER) + b"." + encoded({}) + b".a+/b",
        encoded(HEADER) + b"." + encoded({}) + b".abcde",
        encoded(HEADER) + b"." + encoded({}) + b".ab\xff\xfe",
        encoded(HEADER) + b"." + encoded({}) + b".QR",  # as QQ, with bits that are left over
    ],
)
def test_other_form_than_three_parts_of_base64url_is_refused(sent, refused):
    """An encrypted token has five parts; padding, white space and surplus bits would be a second spelling."""
    assert refused(sent)[0] == "malformed"


@pytest.mark.parametrize(
    "part",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b'{"alg":"RS256"}{}',
        b"\xef\xbb\xbf{}",
        '{"alg":"RS256"}'.encode("utf-16"),
        b'{"alg":"RS256","sub":"\xff"}',
        b'{"alg":"RS256","alg":"none"}',
        b'{"alg":"RS256","cnf":{"jkt":"a","jkt":"b"}}',
        b'{"alg":"RS256","a":[{"b":1,"b":1}]}',
        b'{"alg":"RS256","exp":NaN}',
        b'{"alg":"RS256","exp":Infinity}',
        b'{"alg":"RS256","exp":1e999}',
        b'{"alg":"RS256","a":' + b"[" * 3000 + b"]" * 3000 + b"}",
        b'{"alg":"RS256","a":' + b"9" * 5000 + b"}",
    ],
)
def test_part_that_is_not_one_json_object_is_refused(part, refused):
    """In the header and in the payload; duplicate members are refused at any depth, such as in `cnf`."""
    assert refused(token(part, {})) == refused(token(HEADER, part))
    assert refused(token(part, {}))[0] == "malformed"


def test_nested_token_is_refused(refused):
    """A token in the payload of another one, with `cty` or without."""
    inner = token(HEADER, claims())

    assert refused(token(HEADER, inner))[0] == "malformed"
    assert refused(token({**HEADER, "cty": "JWT"}, inner))[0] == "header"


@pytest.mark.parametrize("name", ["jku", "jwk", "x5u", "x5c", "crit", "b64", "enc", "zip", "cty"])
@pytest.mark.parametrize("value", ["https://attacker.example/keys", ["exp"], {}, None])
def test_header_that_names_a_key_or_an_extension_is_refused(name, value, refused):
    """Whatever its value: it is not ignored, and never followed."""
    assert refused(token({**HEADER, name: value}, claims())) == ("header", f"the token's header has {name}")


@pytest.mark.parametrize(
    "header",
    [{}, {"alg": None}, {"alg": ["RS256"]}, {"alg": 1}, {"alg": "RS256", "kid": 1}, {"alg": "RS256", "typ": 1}],
)
def test_header_parameter_of_another_type_is_refused(header, refused):
    """`alg` is required; `kid` and `typ` are text."""
    assert refused(token(header, claims()))[0] == "malformed"


def test_lengths_are_limited(refused):
    """8192 bytes for a token, 256 characters for its key id."""
    frame = len(token(HEADER, {"a": ""}))
    content = (LONGEST_TOKEN - frame) * 3 // 4

    longest = token(HEADER, {"a": "x" * content})

    assert LONGEST_TOKEN - 2 <= len(longest) <= LONGEST_TOKEN
    assert parse(longest).claims["a"]
    assert refused(token(HEADER, {"a": "x" * (content + 3)})) == ("malformed", "the token has more than 8192 bytes")
    assert parse(token({**HEADER, "kid": "k" * 256}, {})).key_id == "k" * 256
    assert refused(token({**HEADER, "kid": "k" * 257}, {}))[0] == "malformed"


def test_numbers_are_kept():
    """With their fraction: a date may have one."""
    assert parse(token(HEADER, {"exp": 1.5, "nbf": 1})).claims == {"exp": 1.5, "nbf": 1}


def test_unknown_header_parameter_is_ignored():
    """As RFC 7515 section 4 asks for: a thumbprint, or Clerk's category."""
    assert parse(token({**HEADER, "x5t": "a", "cat": "cl_1"}, {})).algorithm == "RS256"


def test_text_of_a_refusal_has_no_part_of_the_token(refused):
    """It is logged."""
    marker = "s3cret-marker"
    tokens = [
        marker.encode(),
        token({**HEADER, "jku": marker}, {}),
        token({"alg": [marker]}, {}),
        token(json.dumps(marker).encode(), {}),
        token(HEADER, base64url(marker.encode())),
    ]

    assert not [text for sent in tokens if marker in (text := refused(sent)[1])]


def test_key_of_a_proof_is_returned():
    """A DPoP proof names its key itself; a token must not."""
    sent = token({"alg": "ES256", "typ": "dpop+jwt", "jwk": {"kty": "EC"}}, {})

    assert parse(sent, with_jwk=True).jwk == {"kty": "EC"}
    assert parse(token({"alg": "ES256"}, {}), with_jwk=True).jwk is None


@pytest.mark.parametrize("name", ["jku", "x5u", "x5c", "crit", "b64", "enc", "zip", "cty"])
def test_header_of_a_proof_that_names_something_else_is_refused(name):
    """The same as in a token."""
    with pytest.raises(Refused) as caught:
        parse(token({"alg": "ES256", "jwk": {}, name: "x"}, {}), with_jwk=True)

    assert caught.value.code == "header"


@pytest.mark.parametrize(
    ("claim", "same"), [("abc", True), ("abd", False), ("", False), ("\u00e9", False), ("\ud800", False), (1, False)]
)
def test_claim_is_compared_as_text(claim, same):
    """Whatever it is."""
    assert is_text(claim, "abc") is same
