"""Error messages for failed downloads: what happened, then what to do."""

import errno
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import DoesNotFit, ModelError, QchatError
from ..quoting import printable
from .cache import cache_folder
from .catalog import PUBLISHED
from .names import closest_names
from .transfer import TEMPORARY_STATUSES, BadResponse, retry_after_seconds

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
FAILURES = (HfHubHTTPError, httpx2.HTTPError, httpx2.InvalidURL, BadResponse, OSError)
RESUMABLE = "; received data is kept: try again to resume"


class DownloadCancelled(QchatError):
    """The user cancelled a download; the received bytes are kept for the next one."""


def hub_host() -> str:
    return urlsplit(constants.ENDPOINT).netloc or constants.ENDPOINT


def explain_failure(error: Exception, id: str, revision: str, advice: str = "") -> QchatError:
    """Convert one of FAILURES to an error for the user; `advice` ends the message of a lost connection."""
    if isinstance(error, OfflineModeIsEnabled):
        return ModelError(f"cannot download {id} while HF_HUB_OFFLINE is set: unset it first")
    if isinstance(error, HfHubHTTPError):
        return ModelError(_explain_status(error, id, revision))
    if isinstance(error, BadResponse):
        return ModelError(f"{id} was not downloaded: {hub_host()} sent something unexpected ({error})")
    if isinstance(error, httpx2.TimeoutException):
        return ModelError(f"{hub_host()} does not answer{advice}")
    if isinstance(error, httpx2.HTTPError | httpx2.InvalidURL):
        return ModelError(f"no connection to {hub_host()} ({printable(str(error))}){advice}")
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return DoesNotFit(f"the disk of {cache_folder()} is full: free some space, then download {id} again")
    return ModelError(f"cannot store {id} in {cache_folder()}: {getattr(error, 'strerror', None) or error}")


def _explain_status(error: HfHubHTTPError, id: str, revision: str) -> str:
    status, page = error.response.status_code, f"{constants.ENDPOINT}/{id}"
    has_token = get_token() is not None
    if isinstance(error, GatedRepoError):
        step = "accept them with your token's account" if has_token else "accept them, then set HF_TOKEN"
        return f"{id} requires accepting its terms at {page}: {step}"
    if isinstance(error, RevisionNotFoundError):
        return f"{id} has no revision {printable(revision)}"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{id} lists a file that {hub_host()} does not have: {urlsplit(str(error.request.url)).path}"
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        near = closest_names(id, [variant.id for variant in PUBLISHED if variant.id != id])
        hint = f"; did you mean {near[0]}?" if near else " (a private model needs HF_TOKEN)"
        return f"{hub_host()} has no model {id}{hint}"
    if status in (401, 403):
        step = "use an HF_TOKEN that has access" if has_token else "set HF_TOKEN"
        return f"{hub_host()} denies access to {id}: {step}"
    if status == 429:
        seconds = retry_after_seconds(error)
        return f"{hub_host()} received too many requests: try again in {seconds or 60:,} seconds"
    if status in TEMPORARY_STATUSES:
        return f"{hub_host()} has a temporary error (HTTP status {status}): try to download {id} again later"
    return f"{hub_host()} refuses to send {id} (HTTP status {status})"
