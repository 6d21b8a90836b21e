"""The script that Alembic runs, for `fastapi-prodkit db`, its own command line and `service.migrate`.

The database is that of the service's settings, so no file here has its password.
"""

from alembic import context
from fastapi_prodkit.database.migrations import run_migrations

from service.config import ServiceSettings
from service.models import Base

run_migrations(context, Base.metadata, ServiceSettings)
