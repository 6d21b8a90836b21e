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
    """Run PostgreSQL with TLS and an owner with the privileges of RDS's; yield libpq's variables, and the server."""
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
        # As RDS creates it: not a superuser, but it may grant the role of IAM.
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
    def test_migrate_exits_with_the_code_of_the_task(self, aws, code):
        """Its log is shown."""
        aws.ends(code=code)

        returned, output, errors = aws.run(FOLDER / "migrate.sh", NAME, "image@sha256:1")

        assert returned == code
        assert output.splitlines() == ["Running upgrade", "Done: 1 migration"]
        assert f"migrate ended with exit code {code}" in errors

    def test_migrate_runs_the_new_image_in_the_network_of_the_service(self, aws):
        """migrate.sh deploys the stack with the new image and runs the migration in the service's subnets."""
        aws.ends()

        aws.run(FOLDER / "migrate.sh", NAME, "image@sha256:1", RELEASE_ROLE="arn:role")

        (deployed,), (ran,) = aws.calls("cloudformation deploy"), aws.calls("ecs run-task")
        assert aws.deployed() == [[f"Name={NAME}", "Image=image@sha256:1"]]
        assert deployed[deployed.index("--role-arn") + 1] == "arn:role"
        assert ran[ran.index("--task-definition") + 1] == DEFINITION
        network = ran[ran.index("--network-configuration") + 1]
        assert network == "awsvpcConfiguration={subnets=[subnet-1,subnet-2],securityGroups=[sg-1]}"

    def test_migrate_stops_after_a_failed_stack(self, aws):
        """If the stack deployment fails, migrate.sh ends with the code of that failure and runs no task."""
        aws.answers["cloudformation deploy"] = 255

        returned, _, _ = aws.run(FOLDER / "migrate.sh", NAME, "image@sha256:1")

        assert returned == 255
        assert not aws.calls("ecs run-task")

    def test_task_without_an_exit_code_is_a_failure(self, aws):
        """Such as an image that cannot be pulled; the reason is shown."""
        aws.ends(code=None, reason="CannotPullContainerError: not found")
        aws.answers["logs get-log-events"] = 254

        returned, _, errors = aws.run(FOLDER / "run-task.sh", NAME, "migrate")

        assert returned == 1
        assert "migrate did not start: CannotPullContainerError: not found" in errors

    def test_refused_task_is_a_failure(self, aws):
        """ECS returns failures although the call succeeds."""
        aws.answers["ecs run-task"] = {"tasks": [], "failures": [{"reason": "RESOURCE"}]}

        returned, _, errors = aws.run(FOLDER / "run-task.sh", NAME, "migrate")

        assert returned == 1
        assert "migrate could not be started" in errors

    def test_run_task_repeats_the_wait_until_its_time_out(self, aws):
        """One wait of the CLI ends after ten minutes. The task is not stopped."""
        aws.ends(status="RUNNING", code=None)
        aws.answers["ecs wait"] = 255

        returned, _, errors = aws.run(FOLDER / "run-task.sh", NAME, "migrate", TASK_HOURS="1")

        assert returned == 1
        assert len(aws.calls("ecs wait")) == 6
        assert "migrate still runs" in errors

    def test_unknown_task_is_an_error(self, aws):
        """For an unknown task name, run-task.sh exits with 2 and names the task in the error message."""
        returned, _, errors = aws.run(FOLDER / "run-task.sh", NAME, "migrat")

        assert (returned, errors) == (2, f"{NAME}-tasks has no task 'migrat'\n")

    def test_deploy_keeps_other_parameters(self, aws):
        """It fails if the release was rolled back."""
        aws.answers["cloudformation deploy"] = 255

        returned, _, _ = aws.run(FOLDER / "deploy.sh", NAME, "image@sha256:1", "1.1.0", "MaxTasks=4")

        assert aws.deployed() == [[f"Name={NAME}", "Image=image@sha256:1", "Version=1.1.0", "MaxTasks=4"]]
        assert returned == 255

    def test_deploy_keeps_a_release_that_answers(self, aws):
        """Each path is requested until it succeeds, or the time is over."""
        with answering({"/ready": [503, 503, 200], "/v1/airports?limit=1": [200]}) as url:
            aws.outputs["Url"] = url
            asked = "/ready", "/v1/airports?limit=1"
            returned, output, _ = aws.run(FOLDER / "release.sh", NAME, "image@sha256:1", "1.1.0", *asked)

        assert returned == 0
        assert output == f"{url}/ready answers\n{url}/v1/airports?limit=1 answers\n"
        assert aws.deployed() == [[f"Name={NAME}", "Image=image@sha256:1", "Version=1.1.0"]]

    def test_deploy_rolls_back_a_release_that_does_not_answer(self, aws):
        """It deploys the earlier image and version, and fails."""
        with answering({"/ready": [500]}) as url:
            aws.outputs["Url"] = url
            returned, _, errors = aws.run(FOLDER / "release.sh", NAME, "image@sha256:1", "1.1.0", TRY_SECONDS="1")

        assert returned == 1
        assert f"{url}/ready does not answer: rolling back from 1.1.0 to 1.0.0\n" in errors
        before, after = aws.deployed()
        assert before == [f"Name={NAME}", "Image=image@sha256:1", "Version=1.1.0"]
        assert after == [f"Name={NAME}", "Image=image@sha256:0", "Version=1.0.0"]

    def test_deploy_fails_if_cloudformation_has_rolled_back(self, aws):
        """With its exit code, and without a request."""
        aws.answers["cloudformation deploy"] = 255

        returned, _, _ = aws.run(FOLDER / "release.sh", NAME, "image@sha256:1", "1.1.0")

        assert returned == 255
        assert len(aws.deployed()) == 1

    @pytest.mark.parametrize("script", ["migrate.sh", "deploy.sh", "release.sh", "run-task.sh"])
    def test_script_without_arguments_shows_its_usage(self, aws, script):
        """An ECS script without arguments prints its usage to standard error and exits with 2."""
        returned, _, errors = aws.run(FOLDER / script)

        assert returned == 2
        assert errors.startswith("usage: ")

    @pytest.mark.parametrize("source", ["docs/deploy/ecs.md", "docs/deploy/ecs-express.md", *BUILDSPECS])
    def test_commands_of_pages_and_builds_are_valid_bash(self, source):
        """bash parses the shell blocks of the ECS pages and the commands of the buildspecs without an error."""
        yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
        text = (ROOT / source).read_text()
        if source.endswith(".md"):
            commands = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        else:
            commands = yaml.safe_load(text)["phases"]["build"]["commands"]

        done = subprocess.run(["bash", "-n"], input="\n".join(commands), capture_output=True, text=True, check=False)

        assert commands
        assert (done.returncode, done.stderr) == (0, "")

    def test_scripts_pass_shellcheck(self):
        """shellcheck reports no problem in the ECS shell scripts, such as missing quotes."""
        command = [program_or_skip("shellcheck"), *FOLDER.glob("*.sh")]

        done = subprocess.run(command, capture_output=True, text=True, check=False)

        assert (done.returncode, done.stdout) == (0, "")


class TestRoles:
    async def test_roles_let_app_use_but_not_change_tables_of_migrator(self, database):
        """After a second run of the script too."""
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

    async def test_roles_sends_no_password_to_an_unverified_server(self, database, tmp_path):
        """The roles script fails before sending the password if the server's certificate is not trusted."""
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
