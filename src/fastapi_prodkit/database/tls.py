"""TLS for connections to PostgreSQL."""

import ssl

from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["ssl_context", "stricter"]

_MODES = ("off", "require", "verify-full")  # least strict first

# libpq's names, https://www.postgresql.org/docs/current/libpq-ssl.html. "allow" and "prefer" let an attacker choose
# plain text, so they count as "off". Verification always includes the host name.
_LIBPQ = {
    "disable": "off",
    "allow": "off",
    "prefer": "off",
    "require": "require",
    "verify-ca": "verify-full",
    "verify-full": "verify-full",
}


def stricter(mode: str, *sslmodes: str) -> str:
    """Return the strictest of our mode and libpq's `sslmode`: a URL can make the setting stricter, never weaker.

    Raises:
        ConfigurationError: libpq has no such mode.
    """
    if not set(sslmodes) <= _LIBPQ.keys():
        raise ConfigurationError(f"DATABASE_URL: sslmode must be one of {', '.join(_LIBPQ)}")
    return max([mode, *(_LIBPQ[sslmode] for sslmode in sslmodes)], key=_MODES.index)


def ssl_context(mode: str, root_cert: str | None) -> ssl.SSLContext | bool:
    """Return the value of asyncpg's argument `ssl`.

    The context is always our own, because asyncpg's modes also read PGSSL* variables and ~/.postgresql.

    Args:
        mode: "off"; "require", which encrypts without verification; "verify-full", which checks certificate and host.
        root_cert: File with the CA certificates for "verify-full"; the system's by default.

    Raises:
        ConfigurationError: The file holds no certificates or cannot be read.
    """
    if mode == "off":
        return False
    if mode == "verify-full":
        return _verifying(root_cert)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _verifying(root_cert: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=root_cert)
    except OSError as error:  # also raised by OpenSSL for invalid content
        raise ConfigurationError(
            f"DATABASE_SSL_ROOT_CERT: no CA certificates (PEM) can be read from {root_cert}: {error.strerror or error}"
        ) from error
