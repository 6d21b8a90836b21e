"""The section of the database."""

from typing import Annotated, Literal

from pydantic import Field, SecretStr

from fastapi_prodkit.sections.section import MaybeSeconds, OrNone, Section

__all__ = ["DatabaseSettings"]


class DatabaseSettings(Section):
    """The database: its connections, time-outs, logging and migrations."""

    url: SecretStr = Field(min_length=1, description="postgresql://user:password@host/name or sqlite:///file.")
    read_url: SecretStr | None = Field(None, min_length=1, description="URL of a read replica.")
    pool_size: int = Field(5, ge=1, description="Connections kept open by each worker.")
    max_overflow: int = Field(5, ge=0, description="Further connections of each worker under load.")
    pool_timeout: float = Field(5.0, gt=0, description="Longest wait for a free connection, seconds.")
    connect_timeout: float = Field(5.0, gt=0, description="Longest time to connect, seconds.")
    command_timeout: float = Field(30.0, gt=0, description="Longest time for one statement, seconds.")
    statement_timeout: MaybeSeconds = Field(
        30.0, gt=0, description="The server cancels a statement that takes longer, seconds; or none."
    )
    lock_timeout: MaybeSeconds = Field(
        10.0, gt=0, description="The server cancels a statement that waits longer for a lock, seconds; or none."
    )
    idle_transaction_timeout: MaybeSeconds = Field(
        60.0, gt=0, description="The server closes a connection that is idle longer in a transaction, seconds; or none."
    )
    pool_recycle: float = Field(300.0, gt=0, description="Age at which a connection is replaced, seconds.")
    pooler: Annotated[Literal["pgbouncer"] | None, OrNone] = Field(
        None, description="pgbouncer, if the URL is that of a PgBouncer that pools transactions."
    )
    password_secret: str | None = Field(
        None, min_length=1, description="AWS Secrets Manager secret with the password; read for each new connection."
    )
    iam_auth: bool = Field(False, description="Use an AWS IAM token as the password of each new connection.")
    startup_timeout: float = Field(0.0, ge=0, description="Longest wait for the database at start-up, seconds.")
    ssl: Literal["off", "require", "verify-full"] = Field("verify-full", description="TLS to PostgreSQL.")
    ssl_root_cert: str | None = Field(None, description="File with the CA certificates; the system's by default.")
    slow_query: MaybeSeconds = Field(1.0, gt=0, description="Log a statement that takes longer, seconds; or none.")
    n_plus_one: Annotated[int | None, OrNone] = Field(
        None, ge=1, description="Warn of a statement that a request repeats more often; or none."
    )
    sql_comment: bool = Field(False, description="Append the request's id to each statement, as a comment.")
    migrations: Literal["fail", "warn", "off"] = Field(
        "fail", description="Status of /ready if migrations are pending."
    )
    migrations_config: str | None = Field(
        None, description="alembic.ini or pyproject.toml of the migrations; if set, /ready checks for pending ones."
    )
    migrations_url: SecretStr | None = Field(
        None, min_length=1, description="URL for migrations, to bypass a pooler or connect as the owner of the tables."
    )
    migrations_lock_timeout: float = Field(
        300.0, ge=0, description="Longest wait for another process that is migrating, seconds."
    )
    migrations_statement_lock_timeout: MaybeSeconds = Field(
        2.0, gt=0, description="Longest wait of a migration's statement for its lock, seconds; or none."
    )
    migrations_retry_for: float = Field(
        600.0, ge=0, description="How long a revision that does not get its lock is retried, seconds."
    )
