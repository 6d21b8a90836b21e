"""Create the two roles of the database: `migrator` owns the tables, `app` reads and writes their rows.

Both connect with an IAM token, never with a password. The script runs as the owner of the database, whose connection
libpq's variables describe (PGHOST, PGDATABASE, PGUSER, PGPASSWORD, PGSSLMODE, PGSSLROOTCERT). It may run again.
"""

import asyncio

import asyncpg

ROLES = """
DO $$
DECLARE
  role text;
BEGIN
  FOREACH role IN ARRAY ARRAY['migrator', 'app'] LOOP
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) THEN
      EXECUTE format('CREATE ROLE %I LOGIN', role);
    END IF;
    EXECUTE format('GRANT rds_iam TO %I', role);
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), role);
  END LOOP;
  EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
  EXECUTE format('GRANT CREATE, TEMPORARY ON DATABASE %I TO migrator', current_database());
END $$;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO migrator;
GRANT USAGE ON SCHEMA public TO app;

-- app may use what migrator creates from now on. Only a member of migrator may grant this, so the owner is one briefly.
GRANT migrator TO CURRENT_USER;
ALTER DEFAULT PRIVILEGES FOR ROLE migrator IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO app;
ALTER DEFAULT PRIVILEGES FOR ROLE migrator IN SCHEMA public GRANT USAGE, SELECT ON SEQUENCES TO app;
REVOKE migrator FROM CURRENT_USER;
"""


async def main() -> None:
    """Connect, and create the roles in one transaction."""
    connection = await asyncpg.connect(timeout=10)
    try:
        async with connection.transaction():
            await connection.execute(ROLES)
    finally:
        await connection.close()
    print("The roles migrator and app are there.")


if __name__ == "__main__":
    asyncio.run(main())
