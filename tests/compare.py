"""How tests compare logits, and where the trained model that some of them read may lie."""

import numpy as np
import pytest
from numpy.typing import ArrayLike

from tests.paths import QTINY, ROOT

TEXT = ROOT / "tests/golden/text.txt"

needs_qtiny = pytest.mark.skipif(not QTINY.is_dir(), reason=f"the trained model is not at {QTINY}")


def relative_rms(actual: ArrayLike, expected: ArrayLike) -> float:
    """rms(actual - expected) / rms(expected), in float64. Raises ValueError where the shapes differ."""
    a, e = (np.asarray(values, dtype=np.float64) for values in (actual, expected))
    if a.shape != e.shape:
        raise ValueError(f"shapes {a.shape} and {e.shape} cannot be compared")
    return float(np.sqrt(np.square(a - e).mean() / np.square(e).mean()))
