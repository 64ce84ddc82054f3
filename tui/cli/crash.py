"""The traceback of an unexpected error, kept in one small file that the next one replaces."""

import platform
import traceback
from datetime import UTC, datetime

from ...core.errors import UsageError
from ...core.machine.files import write_whole
from .. import __version__
from ..user.paths import state_dir


def save(error: Exception) -> str:
    """Write the traceback, without values of variables; return a clause that says where it is."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    header = f"qchat {__version__}, Python {platform.python_version()}, {platform.platform()}, {when}\n\n"
    try:
        path = state_dir() / "last-error.log"
        text = header + "".join(traceback.format_exception(error))
        write_whole(path, text.encode(errors="backslashreplace"), mode=0o600)
    except (OSError, UsageError) as failure:
        return f"its details could not be saved: {failure}"
    return f"its details are in {path}"
