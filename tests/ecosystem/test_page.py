"""The page about agents, whose code needs this environment."""

import os
from contextlib import closing

from forks import Forks
from test_docs import ROOT, RUN_PAGE


def test_page_about_agents_runs(tmp_path):
    """All code of the how-to page about APM agents runs without an error, and none of it is skipped."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "ENVIRONMENT": "dev"}

    with closing(Forks()) as forks:
        page = str(ROOT / "docs/how-to/with-your-apm.md")
        run = forks.run(RUN_PAGE, page, directory=tmp_path, environment=environment)

    assert run.code == 0, run.stderr
    assert "skip" not in run.stderr
