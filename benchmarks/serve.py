"""What uvicorn serves in the benchmarks: the app that the variable BENCHMARK_APP names."""

import os
from typing import Any

from candidates import UNLIMITED


def app() -> Any:
    from in_process import candidates
    from ours import BARE, bare

    name = os.environ["BENCHMARK_APP"]
    return bare() if name == BARE else candidates()[name].make(UNLIMITED)
