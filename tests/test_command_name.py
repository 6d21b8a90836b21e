"""The name of the command: `prodkit` is the command of another package."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

for needed in ("typer", "uvicorn", "airportsdata", "aiosqlite", "alembic", "hatchling"):
    pytest.importorskip(needed, reason=f"needs {needed}")

from processes import PATIENCE, Process, free_port
from test_house import tracked_files

from fastapi_prodkit import __version__
from fastapi_prodkit.cli.program import COMMANDS

ROOT = Path(__file__).parent.parent
SERVICE = ROOT / "examples" / "service"
THEIRS = "prodkit==0.4.0 --hash=sha256:347486bc7296f761793fd37d80a97ca3a13350ae878955baf601d9560df20f56\n"
OURS = f"fastapi-prodkit {__version__}\n"


def test_no_file_names_the_command_of_another_package():
    """Except where that package is mentioned."""
    named = {
        f"{path.relative_to(ROOT)}: {line}"
        for path in tracked_files()
        if path != Path(__file__)
        for line in path.read_text(errors="replace").splitlines()
        if re.search(r"(?<![\w-])prodkit(?![\w-])", line) and "another package" not in line
    }

    assert not named


@pytest.fixture(scope="module", params=["theirs first", "ours first", "theirs removed"])
def both(request, tmp_path_factory):
    """An environment with both packages; their dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("both")
    venv.create(folder, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    (folder / "theirs.txt").write_text(THEIRS)
    theirs = ["install", "--no-deps", "--require-hashes", "--requirement", folder / "theirs.txt"]
    ours = ["install", "--no-deps", "--no-build-isolation", "--reinstall", ROOT]
    steps = [theirs, ours] if request.param == "theirs first" else [ours, theirs]
    if request.param == "theirs removed":
        steps.append(["uninstall", "prodkit"])
    for step in steps:
        pip = [Path(sys.executable).with_name("uv"), "pip", step[0], "--python", folder / "bin" / "python", *step[1:]]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (folder / "bin" / "prodkit").exists() == (request.param != "theirs removed")
    return folder


@pytest.mark.system
class TestBesideProdkit:
    """Environments with both packages, installed in either order, or without the other one again."""

    @pytest.fixture
    def environment(self, both, tmp_path):
        variables = {
            "DATABASE_URL": f"sqlite:///{tmp_path}/service.sqlite3",
            "DATABASE_SSL": "off",
            "AUTH_SECRET": "for-tests-that-sign-no-token-at-all",
        }
        return {"PATH": f"{both / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), **variables}

    def run(self, environment, *command):
        """Run a command in the folder of the example and return its output."""
        done = subprocess.run(
            command, cwd=SERVICE, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @pytest.mark.parametrize("program", [["fastapi-prodkit"], ["python", "-m", "fastapi_prodkit"]], ids=" ".join)
    def test_script_and_module_run_our_commands(self, environment, program):
        """The console script and `python -m` both print our version and list all of our commands."""
        assert self.run(environment, *program, "--version") == OURS
        assert set(COMMANDS) <= set(self.run(environment, *program, "--help").split())

    def test_image_and_ecs_task_run_our_commands(self, environment, tmp_path):
        """The migration of the ECS task, the image's CMD and its HEALTHCHECK."""
        port = free_port()
        lines = re.findall(r"^ *CMD (\[.*\])$", (SERVICE / "Dockerfile").read_text(), re.MULTILINE)
        check, serve = (json.loads(line.replace("8000", str(port))) for line in lines)
        [migrate] = re.findall(r"Command: \[(fastapi-prodkit, .*)\]", (ROOT / "deploy/ecs/tasks.yaml").read_text())

        self.run(environment, *migrate.split(", "))
        migrated = self.run(environment, "fastapi-prodkit", "db", "current")
        with (tmp_path / "output").open("wb") as output:
            how = {"cwd": SERVICE, "env": environment, "stdout": output, "stderr": output}
            server = Process(subprocess.Popen(serve, **how), port, tmp_path / "output")
        try:
            server.wait_until_listening()
            self.run(environment, *check)
        finally:
            server.terminate()
            code = server.wait()

        assert migrated.startswith("0002")
        assert code == 0, server.output()
