"""A TLS certificate for a server on this machine, made for one test."""

import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any

from fastapi_prodkit import _extras

__all__ = ["server_certificate"]


def server_certificate() -> tuple[str, ssl.SSLContext]:
    """Return a certificate for 127.0.0.1, in PEM, and the context of a server that has it.

    Raises:
        MissingExtraError: The extra `auth` is not installed.
    """
    serialization = _extras.require("cryptography.hazmat.primitives.serialization", extra="auth")
    ec = _extras.require("cryptography.hazmat.primitives.asymmetric.ec", extra="auth")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _certificate(key).public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:  # the ssl module reads private keys from files only
        file.write(private + certificate)
        file.flush()
        server.load_cert_chain(file.name)
    return certificate.decode(), server


def _certificate(key: Any) -> Any:
    """Return a certificate that is its own authority, with what strict clients ask for (RFC 5280 section 4.2)."""
    x509 = _extras.require("cryptography.x509", extra="auth")
    hashes = _extras.require("cryptography.hazmat.primitives.hashes", extra="auth")
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test issuer")])
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    public, now = key.public_key(), datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=False, decipher_only=False, **usage),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
