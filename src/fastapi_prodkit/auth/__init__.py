"""Who is calling: OAuth 2.0 access tokens (RFC 6750, 9068) of any OpenID issuer, of a shared secret, and API keys.

    request -> read_credentials -> cache: known and not expired ---------------------------------> User
               one header line       | no
                                     v
               API key:  form > hash > settings or find_key > expiry ----------------------------> User
               token:    parse strictly > iss chooses the issuer > typ > kid and alg choose a key
                         > signature > exp, nbf, iat, aud > access token? > roles and scopes ----> User

               issuer:   discovery > JWK Set, fetched in the background, cached, stale if need be

`Auth` is all of it. It protects the routes that depend on it:

    auth = Auth(AuthSettings(issuer=("https://login.example.com/",), audience=("orders",)))
    app = FastAPI(lifespan=auth.lifespan)

    @app.get("/me")
    async def me(user: Annotated[User, Depends(auth.current_user)]) -> str:
        return user.id

Tokens need the extra `auth`, which is imported when `Auth` is made. API keys need no extra.
"""

from fastapi_prodkit.auth.api_keys import ApiKey, hash_api_key, new_api_key
from fastapi_prodkit.auth.authenticator import Auth
from fastapi_prodkit.auth.user import User

__all__ = ["ApiKey", "Auth", "User", "hash_api_key", "new_api_key"]
