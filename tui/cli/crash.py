"""The traceback of an error nobody foresaw, kept in one small file that the next one replaces."""

import os
import platform
import traceback
from datetime import UTC, datetime

from ...core.errors import UsageError
from .. import __version__
from ..user.paths import state_dir


def save(error: Exception) -> str:
    """Write the traceback, without values of variables; returns a clause that says where it is."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    header = f"qchat {__version__}, Python {platform.python_version()}, {platform.platform()}, {when}\n\n"
    try:
        path = state_dir() / "last-error.log"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(header + "".join(traceback.format_exception(error)))
    except (OSError, UsageError) as failure:
        return f"its details could not be saved: {failure}"
    return f"its details are in {path}"
