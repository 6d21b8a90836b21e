"""Load workflows of GitHub Actions, and run their commands as a runner does."""

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["commands", "load", "replay"]

_EXPRESSION = re.compile(r"\$\{\{ ([\w.]+) \}\}")


def load(path: Path) -> dict[str, Any]:
    """Return a workflow; YAML reads its key `on` as true."""
    return yaml.safe_load(path.read_text())


def commands(workflow: Mapping[str, Any]) -> Iterator[str]:
    """Yield the commands of each step of each job; a job that calls another workflow has none."""
    for job in workflow["jobs"].values():
        for step in job.get("steps", ()):
            if "run" in step:
                yield step["run"]


def replay(
    job: Mapping[str, Any], folder: Path, environment: Mapping[str, str], context: Mapping[str, str] | None = None
) -> str:
    """Run the commands of a job in order, and return their output.

    Args:
        job: The job; what its actions do has been done.
        folder: What has been checked out.
        environment: Variables of the runner.
        context: The value of each expression, such as `vars.NAME`.

    Raises:
        AssertionError: A command has failed, with its output; those after it have not been run.
    """
    values, exported, output = context or {}, folder / ".github_env", ""

    def variables(of: Mapping[str, Any]) -> dict[str, str]:
        return {key: _EXPRESSION.sub(lambda m: values[m[1]], str(value)) for key, value in of.get("env", {}).items()}

    exported.touch()
    for step in job["steps"]:
        if "run" in step:
            set_before = dict(line.split("=", 1) for line in exported.read_text().splitlines())
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]],
                cwd=folder,
                env={**environment, **variables(job), **set_before, **variables(step), "GITHUB_ENV": str(exported)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=600,
                check=False,
            )
            output += done.stdout
            assert done.returncode == 0, f"{step['run']}\n{output}"
    exported.unlink()
    return output
