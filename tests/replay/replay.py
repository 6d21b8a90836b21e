"""Run FastAPI's and Starlette's own tests of routing twice, with the index of routes and without, and compare.

    python tests/replay/replay.py .venv-replay/sdists

The directory has their source packages. Every test must have the same outcome both ways. What the index does not take
over, such as front ends, it leaves to the router, which is counted: most requests must be served by the index.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent

# Tests in which routing matters: a third of FastAPI's. The others are about parameters, schemas and responses.
# Starlette's with trio, which pytest.ini leaves out, differ from those with asyncio in the event loop only.
TESTS = {
    "fastapi": [
        "tests/test_*rout*.py",
        "tests/test_*path*.py",
        "tests/test_*websocket*.py",
        "tests/test_ws_*.py",
        "tests/test_application.py",
        "tests/test_callable_endpoint.py",
        "tests/test_dependency_overrides.py",
        "tests/test_exception_handlers.py",
        "tests/test_*_limits.py",
        "tests/test_frontend.py",
        "tests/test_get_request_body.py",
        "tests/test_http_connection_injection.py",
        "tests/test_inherited_custom_class.py",
        "tests/test_put_no_body.py",
        "tests/test_starlette_*.py",
        "tests/test_strict_content_type_*.py",
        "tests/test_sub_callbacks.py",
        "tests/test_tutorial/test_behind_a_proxy",
        "tests/test_tutorial/test_bigger_applications",
        "tests/test_tutorial/test_custom_request_and_route",
        "tests/test_tutorial/test_path_params",
        "tests/test_tutorial/test_sub_applications",
    ],
    "starlette": [
        "tests/test_applications.py",
        "tests/test_convertors.py",
        "tests/test_endpoints.py",
        "tests/test_exceptions.py",
        "tests/test_routing.py",
        "tests/test_staticfiles.py",
        "tests/test_websockets.py",
    ],
}


def run(source: Path, *options: str) -> dict[str, dict]:
    """Run the tests of one package, and return what the plugin has noted."""
    paths = sorted({str(path) for pattern in TESTS[package_of(source)] for path in source.glob(pattern)})
    noted = source / f"outcomes{''.join(options)}.json"
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", HERE / "pytest.ini", f"--rootdir={source}", *paths),
            *("-p", "indexed", f"--outcomes={noted}", *options),
        ],
        cwd=source,
        env={**os.environ, "PYTHONPATH": f"{HERE}:{source}"},
        capture_output=True,
        text=True,
        check=False,
    )
    if not noted.exists():
        raise SystemExit(ran.stdout + ran.stderr)
    return json.loads(noted.read_text())


def compare(source: Path) -> bool:
    """Print the differences, and return whether there are none."""
    with ThreadPoolExecutor(2) as threads:
        without, indexed = threads.map(lambda options: run(source, *options), ((), ("--index",)))
    before, after = without["outcomes"], indexed["outcomes"]
    different = [test for test in sorted(before | after) if before.get(test) != after.get(test)]
    for test in different:
        print(f"{test}: {before.get(test)} without the index, {after.get(test)} with it")
    passed = sum(outcome == "passed" for outcome in before.values())
    found, left = (indexed["requests"].get(kind, 0) for kind in ("found", "left"))
    print(f"{source.name}: {passed} of {len(before)} tests pass without the index, {len(different)} differ with it,")
    print(f"  which has found the routes of {found} requests, and left {left} to the router")
    return not different and passed >= len(before) * 0.95 and found > left


def package_of(source: Path) -> str:
    return source.name.partition("-")[0]


def unpack(archive: Path, directory: str) -> Path:
    """Unpack the tests of a source package, and the examples that they import, but not the package itself."""
    with tarfile.open(archive) as packed:
        wanted = [member for member in packed if member.name.split("/")[1] in {"tests", "docs_src"}]
        packed.extractall(directory, wanted, filter="data")
    return Path(directory) / archive.name.removesuffix(".tar.gz")


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        sources = [unpack(archive, directory) for archive in sorted(Path(sys.argv[1]).glob("*.tar.gz"))]
        same = [compare(source) for source in sources]
    return int(sorted(map(package_of, sources)) != sorted(TESTS) or not all(same))


if __name__ == "__main__":
    sys.exit(main())
