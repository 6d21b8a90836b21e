"""Make tokens of any form, right or wrong, without a library that refuses to."""

import base64
import hashlib
import hmac
import json
import time

SECRET = "correct-horse-battery-staple-0123456789"
ISSUER = "https://login.example.com"


def base64url(content):
    return base64.urlsafe_b64encode(content).rstrip(b"=")


def encoded(part):
    """Return a part of a token: bytes as they are, anything else as JSON."""
    return base64url(part if isinstance(part, bytes) else json.dumps(part).encode())


def token(header, claims, sign=lambda signed: b"signature"):
    """Return a token with this header and these claims, each an object or bytes."""
    signed = encoded(header) + b"." + encoded(claims)
    return signed + b"." + base64url(sign(signed))


def hs256(secret=SECRET):
    """Return a function that signs with a secret."""
    key = secret if isinstance(secret, bytes) else secret.encode()
    return lambda signed: hmac.new(key, signed, hashlib.sha256).digest()


def claims(**others):
    """Return claims that are right for an hour; None leaves one out."""
    now = int(time.time())
    found = {"iss": ISSUER, "sub": "alice", "aud": "orders", "iat": now, "exp": now + 3600, "scope": "read", **others}
    return {name: value for name, value in found.items() if value is not None}


def secret_token(header=None, **others):
    """Return a token that is signed with SECRET."""
    return token({"alg": "HS256", "typ": "JWT", **(header or {})}, claims(**others), hs256()).decode()
