"""The programs of deploy/ecs: migrate.sh, deploy.sh, run-task.sh, and roles.py."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("botocore", reason="the extra aws is not installed")

from fake_aws import DEFINITION, NAME, Aws
from fronts import answering
from programs import program_or_skip

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "ecs"
BUILDSPECS = sorted(path.relative_to(ROOT).as_posix() for path in FOLDER.glob("buildspec-*.yml"))


@pytest.fixture
def aws(tmp_path):
    if os.name != "posix":
        pytest.skip("the scripts are for bash")
    return Aws(tmp_path)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """Run PostgreSQL with TLS and an owner with the rights of RDS's; yield libpq's variables for it, and the server."""
    asyncpg = pytest.importorskip("asyncpg", reason="the extra database is not installed")
    trustme = pytest.importorskip("trustme", reason="trustme is not installed")
    from postgres import PostgresMissingError, postgres

    bundle = tmp_path_factory.mktemp("rds") / "bundle.pem"
    authority = trustme.CA()
    authority.cert_pem.write_to_path(bundle)
    leaf = authority.issue_cert("localhost")
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)

    async def prepare(url):
        connection = await asyncpg.connect(url)
        # As RDS makes them: not a superuser, and may pass the role of IAM on.
        await connection.execute("CREATE ROLE rds_iam")
        await connection.execute("CREATE ROLE owner LOGIN CREATEDB CREATEROLE PASSWORD 'owner'")
        await connection.execute("GRANT rds_iam TO owner WITH ADMIN OPTION")
        await connection.execute("CREATE DATABASE shop OWNER owner")
        await connection.close()

    try:
        with postgres(certificate=chain, key=leaf.private_key_pem.bytes()) as server:
            asyncio.run(prepare(server.url()))
            yield (
                {
                    "PGHOST": "localhost",
                    "PGPORT": str(server.port),
                    "PGDATABASE": "shop",
                    "PGUSER": "owner",
                    "PGPASSWORD": "owner",
                    "PGSSLMODE": "verify-full",
                    "PGSSLROOTCERT": str(bundle),
                },
                server,
            )
    except PostgresMissingError as error:
        pytest.skip(str(error))


class TestScripts:
    @pytest.mark.parametrize("code", [0, 1, 143])
    def test_a_migration_ends_with_its_own_exit_code(self, aws, code):
        """What `fastapi-prodkit db upgrade` says decides whether the release goes on, and its log is shown."""
        aws.ends(code=code)

        returned, output, errors = aws.run(FOLDER / "migrate.sh", NAME, "image@sha256:1")

        assert returned == code
        assert output.splitlines() == ["Running upgrade", "Done: 1 migration"]
        assert f"migrate ended with exit code {code}" in errors

    def test_a_migration_runs_the_releases_image_in_the_services_network(self, aws):
        """First the stack of the tasks gets the image; then its task runs where the database can be reached."""
        aws.ends()

        aws.run(FOLDER / "migrate.sh", NAME, "image@sha256:1", RELEASE_ROLE="arn:role")

        (deployed,), (ran,) = aws.calls("cloudformation deploy"), aws.calls("ecs run-task")
        assert aws.deployed() == [[f"Name={NAME}", "Image=image@sha256:1"]]
        assert deployed[deployed.index("--role-arn") + 1] == "arn:role"
        assert ran[ran.index("--task-definition") + 1] == DEFINITION
        network = ran[ran.index("--network-configuration") + 1]
        assert network == "awsvpcConfiguration={subnets=[subnet-1,subnet-2],securityGroups=[sg-1]}"

    def test_a_stack_that_fails_runs_no_migration(self, aws):
        """The script ends at the first step that fails."""
        aws.answers["cloudformation deploy"] = 255

        returned, _, _ = aws.run(FOLDER / "migrate.sh", NAME, "image@sha256:1")

        assert returned == 255
        assert not aws.calls("ecs run-task")

    def test_a_task_that_never_began_is_a_failure_with_its_reason(self, aws):
        """An image that cannot be pulled leaves no exit code; that is not a success."""
        aws.ends(code=None, reason="CannotPullContainerError: not found")
        aws.answers["logs get-log-events"] = 254

        returned, _, errors = aws.run(FOLDER / "run-task.sh", NAME, "migrate")

        assert returned == 1
        assert "migrate did not start: CannotPullContainerError: not found" in errors

    def test_a_task_that_is_not_accepted_is_a_failure(self, aws):
        """ECS answers with failures instead of tasks, and the call itself succeeds."""
        aws.answers["ecs run-task"] = {"tasks": [], "failures": [{"reason": "RESOURCE"}]}

        returned, _, errors = aws.run(FOLDER / "run-task.sh", NAME, "migrate")

        assert returned == 1
        assert "migrate could not be started" in errors

    def test_it_waits_as_long_as_it_is_told(self, aws):
        """A wait of the CLI gives up after ten minutes, so six are an hour; then it fails, and stops nothing."""
        aws.ends(status="RUNNING", code=None)
        aws.answers["ecs wait"] = 255

        returned, _, errors = aws.run(FOLDER / "run-task.sh", NAME, "migrate", TASK_HOURS="1")

        assert returned == 1
        assert len(aws.calls("ecs wait")) == 6
        assert "migrate still runs" in errors

    def test_an_unknown_task_is_named(self, aws):
        """A slip in the name runs nothing."""
        returned, _, errors = aws.run(FOLDER / "run-task.sh", NAME, "migrat")

        assert (returned, errors) == (2, f"{NAME}-tasks has no task 'migrat'\n")

    def test_a_release_keeps_the_parameters_that_it_does_not_name(self, aws):
        """deploy.sh overrides name, image, version and what it is given, and fails if the release was rolled back."""
        aws.answers["cloudformation deploy"] = 255

        returned, _, _ = aws.run(FOLDER / "deploy.sh", NAME, "image@sha256:1", "1.1.0", "MaxTasks=4")

        assert aws.deployed() == [[f"Name={NAME}", "Image=image@sha256:1", "Version=1.1.0", "MaxTasks=4"]]
        assert returned == 255

    def test_a_release_that_answers_stays(self, aws):
        """Each path is asked again while it fails, until its time is over."""
        with answering({"/ready": [503, 503, 200], "/v1/airports?limit=1": [200]}) as url:
            aws.outputs["Url"] = url
            asked = "/ready", "/v1/airports?limit=1"
            returned, output, _ = aws.run(FOLDER / "release.sh", NAME, "image@sha256:1", "1.1.0", *asked)

        assert returned == 0
        assert output == f"{url}/ready answers\n{url}/v1/airports?limit=1 answers\n"
        assert aws.deployed() == [[f"Name={NAME}", "Image=image@sha256:1", "Version=1.1.0"]]

    def test_a_release_that_does_not_answer_is_taken_back(self, aws):
        """The image and the version that were there before are deployed again, and the script fails."""
        with answering({"/ready": [500]}) as url:
            aws.outputs["Url"] = url
            returned, _, errors = aws.run(FOLDER / "release.sh", NAME, "image@sha256:1", "1.1.0", TRY_SECONDS="1")

        assert returned == 1
        assert f"{url}/ready does not answer: rolling back from 1.1.0 to 1.0.0\n" in errors
        before, after = aws.deployed()
        assert before == [f"Name={NAME}", "Image=image@sha256:1", "Version=1.1.0"]
        assert after == [f"Name={NAME}", "Image=image@sha256:0", "Version=1.0.0"]

    def test_a_release_that_aws_took_back_is_not_tried(self, aws):
        """CloudFormation has restored what was there: the script fails with its exit code."""
        aws.answers["cloudformation deploy"] = 255

        returned, _, _ = aws.run(FOLDER / "release.sh", NAME, "image@sha256:1", "1.1.0")

        assert returned == 255
        assert len(aws.deployed()) == 1

    @pytest.mark.parametrize("script", ["migrate.sh", "deploy.sh", "release.sh", "run-task.sh"])
    def test_without_arguments_it_says_what_to_type(self, aws, script):
        """Nothing is asked of AWS."""
        returned, _, errors = aws.run(FOLDER / script)

        assert returned == 2
        assert errors.startswith("usage: ")

    @pytest.mark.parametrize("source", ["docs/deploy/ecs.md", "docs/deploy/ecs-express.md", *BUILDSPECS])
    def test_what_is_typed_or_built_is_bash(self, source):
        """The blocks of the pages and the commands of the builds can be parsed."""
        yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
        text = (ROOT / source).read_text()
        if source.endswith(".md"):
            commands = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        else:
            commands = yaml.safe_load(text)["phases"]["build"]["commands"]

        done = subprocess.run(["bash", "-n"], input="\n".join(commands), capture_output=True, text=True, check=False)

        assert commands
        assert (done.returncode, done.stderr) == (0, "")

    def test_shellcheck_finds_nothing(self):
        """The scripts quote what they should."""
        command = [program_or_skip("shellcheck"), *FOLDER.glob("*.sh")]

        done = subprocess.run(command, capture_output=True, text=True, check=False)

        assert (done.returncode, done.stdout) == (0, "")


class TestRoles:
    async def test_migrator_owns_the_tables_and_app_reads_and_writes_their_rows(self, database):
        """The script may run again; then a table that one makes is one that the other can use, and cannot change."""
        import asyncpg

        variables, server = database
        for _ in range(2):
            done = await asyncio.to_thread(make_roles, variables)
            assert (done.returncode, done.stdout) == (0, "The roles migrator and app are there.\n"), done.stderr
        administrator = await asyncpg.connect(server.url())
        await administrator.execute("ALTER ROLE migrator PASSWORD 'x'; ALTER ROLE app PASSWORD 'x'")
        await administrator.close()
        place = {"host": server.host, "port": server.port, "database": "shop", "password": "x"}
        migrator, app = await asyncpg.connect(user="migrator", **place), await asyncpg.connect(user="app", **place)

        await migrator.execute("CREATE TABLE items (id serial PRIMARY KEY, name text); CREATE SCHEMA extra")
        await app.execute("INSERT INTO items (name) VALUES ('saw'); UPDATE items SET name = 'axe'")

        assert await app.fetchval("SELECT name FROM items") == "axe"
        assert await app.fetchval("SELECT pg_has_role('app', 'rds_iam', 'MEMBER')")
        for forbidden in ("DROP TABLE items", "TRUNCATE items", "CREATE TABLE mine ()", "SET ROLE migrator"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await app.execute(forbidden)
        await migrator.close()
        await app.close()

    async def test_a_server_that_is_not_in_the_bundle_gets_no_password(self, database, tmp_path):
        """The owner's password goes to a server that Amazon's certificates vouch for, or nowhere."""
        trustme = pytest.importorskip("trustme", reason="trustme is not installed")
        other = tmp_path / "other.pem"
        trustme.CA().cert_pem.write_to_path(other)

        done = await asyncio.to_thread(make_roles, database[0] | {"PGSSLROOTCERT": str(other)})

        assert done.returncode == 1
        assert "certificate verify failed" in done.stderr


def make_roles(variables):
    """Run roles.py as its task does."""
    return subprocess.run(
        [sys.executable, "-W", "error", FOLDER / "image" / "roles.py"],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
