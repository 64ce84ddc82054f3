"""The Hugging Face cache, shared with other tools: paths of models, atomic publishing, deletion.

Layout: `models--OWNER--NAME/` with `blobs/DIGEST`, `snapshots/COMMIT/FILE -> ../../blobs/DIGEST` and
`refs/REVISION`, which holds a commit. Rejects ids and revisions that could lead outside the cache.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants

from ..errors import UsageError
from ..machine.files import file_nbytes, unused_name, write_whole
from ..quoting import printable

CONFIG_NAME = "config.json"
# the files to download besides weights
SMALL_NAMES = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "README.md",
)
WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
MODEL_ID = re.compile(rf"{WORD}/{WORD}")
REVISION = re.compile(rf"{WORD}(?:/{WORD}){{0,4}}")
COMMIT = re.compile(r"[0-9a-f]{40}")
FOLDER = re.compile(rf"models--({WORD})--({WORD})")
PARTIAL = ".incomplete"
MAX_COMMIT_NBYTES = 100


def cache_folder() -> Path:
    """Return the cache folder set by HF_HUB_CACHE, HF_HOME or XDG_CACHE_HOME."""
    return Path(constants.HF_HUB_CACHE)


def is_id(text: str) -> bool:
    """Tell whether `text` has the form owner/name or owner/name@revision."""
    id, _, revision = text.partition("@")
    return bool(
        MODEL_ID.fullmatch(id)
        and not re.search(r"--|\.\.|\.git$", id)
        and (not revision or (REVISION.fullmatch(revision) and ".." not in revision))
    )


def parse_id(text: str) -> tuple[str, str]:
    """Split owner/name@revision into id and revision, by default the main branch. Raises UsageError."""
    id, _, revision = text.partition("@")
    if not is_id(text):
        raise UsageError(
            f"{printable(text)} is not a Hugging Face id, wanted owner/name or owner/name@revision"
        )
    return id, revision or constants.DEFAULT_REVISION


@dataclass(frozen=True)
class Repository:
    """The folder of the model `id` in the cache; it need not exist."""

    cache: Path
    id: str

    @property
    def folder(self) -> Path:
        return self.cache / f"models--{self.id.replace('/', '--')}"

    def blob(self, digest: str) -> Path:
        return self.folder / "blobs" / digest

    def partial(self, digest: str) -> Path:
        """The file that holds a partly downloaded blob."""
        return self.folder / "blobs" / f"{digest}{PARTIAL}"

    def lock(self, digest: str) -> Path:
        """The lock file of a blob, the same that huggingface_hub uses."""
        return self.cache / ".locks" / self.folder.name / f"{digest}.lock"

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def commits(self) -> list[str]:
        """Return the commits of all snapshots, complete or not, newest first."""
        found = _entries(self.folder / "snapshots")
        found = [path for path in found if COMMIT.fullmatch(path.name) and path.is_dir()]
        return [path.name for path in sorted(found, key=_modified_at, reverse=True)]

    def find_snapshot(self, revision: str) -> Path | None:
        """Return the snapshot of a branch, a tag, or a commit, which may be abbreviated to 7 digits."""
        ref = self.folder / "refs" / revision
        try:
            commit = ref.read_bytes()[:MAX_COMMIT_NBYTES].decode("ascii", "replace") if ref.is_file() else ""
        except OSError:
            commit = ""
        known = self.commits()
        if commit in known:
            return self.snapshot(commit)
        short = [name for name in known if len(revision) >= 7 and name.startswith(revision)]
        return self.snapshot(short[0]) if len(short) == 1 else None

    def partial_nbytes(self) -> int:
        """Return the bytes of partly downloaded files."""
        parts = (path for path in _entries(self.folder / "blobs") if path.name.endswith(PARTIAL))
        return sum(map(file_nbytes, parts))

    def publish(self, commit: str, digests: Mapping[str, str], revision: str) -> None:
        """Create the snapshot: link each name of `digests`, which include config.json, to its existing blob.

        A folder counts as a model once it has a config. So the config is removed first and linked last.
        Raises OSError.
        """
        folder = self.snapshot(commit)
        links = {folder / name: self.blob(digest) for name, digest in digests.items()}
        config = folder / CONFIG_NAME
        if not all(_links_to(link, blob) for link, blob in links.items()):
            _remove_config(config, links[config])
            for link, blob in sorted(links.items(), key=lambda item: item[0] == config):
                _link(link, blob)
        if revision != commit:
            ref = self.folder / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_whole(ref, commit)

    def delete(self, commit: str) -> None:
        """Delete a snapshot and the blobs that only it uses, or finally the folder. Raises OSError."""
        if commit in self.commits():
            from huggingface_hub import scan_cache_dir
            from huggingface_hub.utils import logging as library_log

            library_log.set_verbosity_error()  # failures are raised below
            scanned = scan_cache_dir(self.cache)
            # another model may have the same commit
            own = frozenset(repo for repo in scanned.repos if repo.repo_path.name == self.folder.name)
            replace(scanned, repos=own).delete_revisions(commit).execute()
        if set(self.commits()) <= {commit} and self.folder.exists():
            shutil.rmtree(self.folder)
            shutil.rmtree(self.cache / ".locks" / self.folder.name, ignore_errors=True)
        if commit in self.commits():
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(self.snapshot(commit)))


def list_repositories(cache: Path) -> Iterator[Repository]:
    """Yield the repository of every model in the cache, sorted by id."""
    for path in sorted(_entries(cache)):
        found = FOLDER.fullmatch(path.name)
        if found and path.is_dir():
            yield Repository(cache, "/".join(found.groups()))


def containing_repository(snapshot: Path) -> Repository:
    """Return the repository that contains or is the folder `snapshot`. Raises UsageError if there is none."""
    for folder in (snapshot, *snapshot.parents):
        found = FOLDER.fullmatch(folder.name)
        if found:
            return Repository(folder.parent, "/".join(found.groups()))
    raise UsageError(f"{snapshot} is not in a Hugging Face cache")


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _modified_at(path: Path) -> float:
    return path.stat().st_mtime


def _links_to(link: Path, blob: Path) -> bool:
    """Tell whether `link` leads to `blob`; without symlinks it is the file itself and there is no blob."""
    return link.samefile(blob) if link.exists() and blob.exists() else link.exists()


def _remove_config(config: Path, blob: Path) -> None:
    """Remove the config's name, keeping its contents as the blob."""
    if blob.exists():
        config.unlink(missing_ok=True)
    elif config.exists():
        config.replace(blob)


def _link(link: Path, blob: Path) -> None:
    if not blob.exists():
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    new = unused_name(link)
    try:
        new.symlink_to(os.path.relpath(blob, link.parent))
    except OSError:  # a file system without symlinks
        blob.replace(link)
    else:
        new.replace(link)
