from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))  # the suites are scripts, not a package

from tests.training.conftest import data_folder

__all__ = ["data_folder"]
