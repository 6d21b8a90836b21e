"""What uvicorn serves in the benchmarks: the app that the variable BENCHMARK_APP names."""

import os
from typing import Any

import apps
from candidates import UNLIMITED


def app() -> Any:
    return apps.find(os.environ["BENCHMARK_APP"]).make(UNLIMITED)
