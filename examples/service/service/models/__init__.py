"""The tables. Importing this package registers them all with `Base.metadata`."""

from service.models.airport import Airport
from service.models.base import Base
from service.models.report import Report

__all__ = ["Airport", "Base", "Report"]
