"""`fastapi-prodkit doctor`: what is unsafe, slow or misconfigured, before production finds out."""

from fastapi_prodkit.cli.doctor.command import app

__all__ = ["app"]
