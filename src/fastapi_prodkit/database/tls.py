"""TLS to PostgreSQL."""

import ssl

from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["ssl_context", "stricter"]

_MODES = ("off", "require", "verify-full")  # from weak to strict

# libpq's names, https://www.postgresql.org/docs/current/libpq-ssl.html: "allow" and "prefer" let an attacker choose
# plain text, so they ask for nothing. There is no verification without the host name here.
_LIBPQ = {
    "disable": "off",
    "allow": "off",
    "prefer": "off",
    "require": "require",
    "verify-ca": "verify-full",
    "verify-full": "verify-full",
}


def stricter(mode: str, *sslmodes: str) -> str:
    """Return the strictest of our mode and libpq's `sslmode`: a URL can tighten what the setting says, not loosen it.

    Raises:
        ConfigurationError: libpq knows no such mode.
    """
    if not set(sslmodes) <= _LIBPQ.keys():
        raise ConfigurationError(f"DATABASE_URL: sslmode must be one of {', '.join(_LIBPQ)}")
    return max([mode, *(_LIBPQ[sslmode] for sslmode in sslmodes)], key=_MODES.index)


def ssl_context(mode: str, root_cert: str | None) -> ssl.SSLContext | bool:
    """Return what asyncpg takes as `ssl`.

    Always a context of our own: asyncpg's own modes also read PGSSL* variables and ~/.postgresql.

    Args:
        mode: "off"; "require" encrypts to whoever answers; "verify-full" checks certificate and host name.
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
    except OSError as error:  # what OpenSSL makes of the content is an OSError, too
        raise ConfigurationError(
            f"DATABASE_SSL_ROOT_CERT: no CA certificates (PEM) can be read from {root_cert}: {error.strerror or error}"
        ) from error
