"""What the server runs: `uvicorn service.main:app`, configured by the environment."""

from service.application import build
from service.config import ServiceSettings

app = build(ServiceSettings())
