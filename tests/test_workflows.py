"""The workflows of GitHub Actions: valid, with as few rights as they need, and nobody's moving tag in them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

WORKFLOWS = sorted((Path(__file__).parent.parent / ".github" / "workflows").glob("*.yml"))
_USES = re.compile(r"uses: (\S+)(.*)")

each_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)


@each_workflow
def test_it_is_valid(workflow):
    """GitHub's own schema has nothing against it."""
    pytest.importorskip("check_jsonschema", reason="needs check-jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", workflow]

    checked = subprocess.run(command, capture_output=True, text=True, check=False)

    assert checked.returncode == 0, checked.stdout


@each_workflow
def test_its_actions_are_pinned(workflow):
    """A tag can be moved to other code; a commit cannot. The version stands behind it."""
    used = _USES.findall(workflow.read_text())

    assert used
    assert [action for action, version in used if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action)] == []
    assert [action for action, version in used if not re.fullmatch(r" # v[\d.]+", version)] == []


@each_workflow
def test_its_rights_are_few(workflow):
    """None for the whole but to read; a job that needs more says so, and says what for."""
    text = workflow.read_text()
    whole = re.search(r"^permissions:(.*(?:\n  \S.*)*)", text, re.MULTILINE)[1].split()
    more = re.findall(r"^ +([\w-]+: write)(.*)$", text, re.MULTILINE)

    assert whole in (["{}"], ["contents:", "read"])
    assert all(reason.startswith(" # ") for _, reason in more)
    assert {right for right, _ in more} <= {"id-token: write"}


@each_workflow
def test_its_commands_are_what_is_run_here(workflow):
    """Each step is a command of the Makefile or `.ci/run`, which run with every change; or it stands in this list."""
    elsewhere = {'test "v$(sed -n': "there is no tag here"}
    steps = re.findall(r"run: (.+)", workflow.read_text())

    assert [
        step
        for step in steps
        if not re.fullmatch(r"make \w+|\.ci/run", step) and not any(step.startswith(start) for start in elsewhere)
    ] == []


def test_the_tag_of_a_release_is_its_version():
    """What the release compares with the tag is the version that the wheel has."""
    import fastapi_prodkit

    root = WORKFLOWS[0].parents[2]
    text = (root / ".github/workflows/release.yml").read_text()
    command = text[text.index("$(sed") + 2 : text.index(')" = "$GITHUB_REF_NAME"')]

    printed = subprocess.run(["sh", "-c", command], cwd=root, capture_output=True, text=True, check=True).stdout

    assert printed.strip() == fastapi_prodkit.__version__
