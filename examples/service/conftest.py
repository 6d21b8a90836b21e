"""Let tests import `service`, which is not installed: it runs from its folder, as it does in its container."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
