"""Run the benchmarks, each in a process of its own, and write the results of all to results/<python>.json.

    python benchmarks [PART ...]

With parts only these run, and nothing is written. Otherwise `report.py` then shows the results in the documentation.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import report

HERE = Path(__file__).parent
PARTS: dict[str, tuple[str, ...]] = {
    "in_process": (),
    "routing": (),
    "auth": (),
    "log_handlers": (),
    "over_the_wire": (),
    "hostile": (),
    "allocations": (),
    "imports": ("--rounds", "3"),
    "start_up": (),
    "scrape": (),
    "database": ("--seconds", "5"),
    "rate_limit": (),
}


def run(part: str, options: tuple[str, ...]) -> list[dict[str, Any]]:
    print(f"\n== {part}", flush=True)
    start = time.monotonic()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, str(HERE / f"{part}.py"), "--json", file.name, *options]
        subprocess.run(command, check=True)
        print(f"({time.monotonic() - start:.0f} s)", flush=True)
        return list(json.loads(file.read()))


def environment() -> dict[str, Any]:
    """Return what the figures depend on."""
    locked = re.findall(r"^([\w.-]+)", (HERE.parent / "requirements" / "bench.txt").read_text(), re.MULTILINE)
    installed: dict[str, str] = {}
    for each in importlib.metadata.distributions():  # those of .venv, which have other versions, are the last
        installed.setdefault(re.sub(r"[-_.]+", "-", each.name).lower(), each.version)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "packages": {name: installed[name] for name in locked if name in installed},
    }


def processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    facts = dict(part.split("\t: ", 1) for part in (line.replace("\t\t:", "\t:") for line in lines) if "\t: " in part)
    return facts.get("model name", platform.processor() or platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="parts to run; all of them unless given")
    chosen = parser.parse_args().parts
    if not chosen and not shutil.which("wrk"):
        sys.exit("wrk is missing: apt install wrk (Debian, Ubuntu), or name the parts to run")
    tables = [table for part in chosen or PARTS for table in run(part, PARTS[part])]
    if not chosen:
        path = report.RESULTS / f"{sys.version_info.major}.{sys.version_info.minor}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**environment(), "tables": tables}, indent=1) + "\n")
        report.main()


if __name__ == "__main__":
    main()
