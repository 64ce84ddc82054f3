"""qchat: Qwen3.5 and Qwen3.6 hybrid models in the terminal, on the command line and from Python."""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if _here.parent.name == ".dev":  # a checkout, whose packages are at its root
    __path__ = [str(_here.parents[1])]
