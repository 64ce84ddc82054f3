"""Where the checkout is, and the inputs outside the repository that some tests read."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
# published tokenizers, configs and templates
QWEN = SHARED / "qwen"
# a trained checkpoint
QTINY = Path(os.environ.get("TESTS_QTINY", SHARED / "models/qtiny-24m"))
