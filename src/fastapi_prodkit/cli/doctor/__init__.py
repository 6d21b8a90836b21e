"""`fastapi-prodkit doctor`: report unsafe, slow or wrong configuration before a deployment."""

from fastapi_prodkit.cli.doctor.command import app

__all__ = ["app"]
