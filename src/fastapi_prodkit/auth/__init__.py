"""Who is calling: OAuth 2.0 access tokens (RFC 6750, 9068) of any OpenID issuer, of a shared secret, and API keys.

    request -> read_credentials -> cache: known and not expired ---------------------------------> User
               one header line       | no
                                     v
               API key:  form > hash > settings or find_key > expiry ----------------------------> User
               token:    parse strictly > iss chooses the issuer > typ > kid and alg choose a key
                         > signature > exp, nbf, iat, aud > access token? > roles and scopes ----> User
               DPoP:     a proof of this request and token > the token, bound to its key > not seen before

               issuer:   discovery > JWK Set, fetched in the background, cached, stale if need be

`Auth` does all of it. `create_app` calls `guard_routes(app, auth)`, which refuses each request without credentials,
except requests for routes that need no caller:

    the app's middleware > guard: rule of the route > caller > roles and scopes > router > handler

The modules: `credentials` (read the header lines), `jose` (parse a token), `fetching`, `issuers` and `keys` (whose keys
are trusted), `presets` and `claims` (what a token says), `hierarchy` (of roles), `tokens` (all of that), `dpop` (tokens
that are bound to a key), with `proof_keys`, `request_url` and `nonces`, `api_keys`, `cache` (of verified credentials),
`challenges` (what a client is told), `caller` (note who calls), `authenticator` (`Auth`), `rules` (who may call a
route), `websockets` (tokens of browsers, and what ends with them), `guard` (in front of the router), `schema` (the
OpenAPI document).

Tokens need the extra `auth`, which is imported when `Auth` is made. API keys need no extra.
"""

from fastapi_prodkit.auth.api_keys import ApiKey, hash_api_key, new_api_key
from fastapi_prodkit.auth.authenticator import Auth
from fastapi_prodkit.auth.guard import guard_routes
from fastapi_prodkit.auth.rules import (
    CurrentUser,
    OptionalUser,
    current_user,
    optional_user,
    public,
    require_roles,
    require_scopes,
)
from fastapi_prodkit.auth.schema import add_security_schemes
from fastapi_prodkit.auth.user import User
from fastapi_prodkit.auth.websockets import authenticate_first_message

__all__ = [
    "ApiKey",
    "Auth",
    "CurrentUser",
    "OptionalUser",
    "User",
    "add_security_schemes",
    "authenticate_first_message",
    "current_user",
    "guard_routes",
    "hash_api_key",
    "new_api_key",
    "optional_user",
    "public",
    "require_roles",
    "require_scopes",
]
