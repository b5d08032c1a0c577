"""Lets the tests here share `checkpoint_fakes`, which their own sub-processes import as well."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
