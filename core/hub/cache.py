"""The Hugging Face cache, which all tools share: where a model of the hub lies, published and deleted whole.

Layout: `models--OWNER--NAME/` with `blobs/DIGEST`, `snapshots/COMMIT/FILE -> ../../blobs/DIGEST` and
`refs/REVISION`, which holds a commit. Refuses ids and revisions that could lead elsewhere.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants

from ..checkpoint.header import printable
from ..errors import UsageError
from ..machine.files import unused_name, write_whole

CONFIG_NAME = "config.json"
# the files besides weights that a model may have and that are fetched
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
    """Where HF_HUB_CACHE, HF_HOME and XDG_CACHE_HOME say that the cache is."""
    return Path(constants.HF_HUB_CACHE)


def is_id(text: str) -> bool:
    """Whether `text` has the form owner/name, with or without @revision."""
    id, _, revision = text.partition("@")
    return bool(
        MODEL_ID.fullmatch(id)
        and not re.search(r"--|\.\.|\.git$", id)
        and (not revision or (REVISION.fullmatch(revision) and ".." not in revision))
    )


def parse_id(text: str) -> tuple[str, str]:
    """Id and revision of owner/name or owner/name@revision. Raises UsageError."""
    id, _, revision = text.partition("@")
    if not is_id(text):
        raise UsageError(f"{printable(text)} is no id of the hub, wanted owner/name or owner/name@revision")
    return id, revision or constants.DEFAULT_REVISION


@dataclass(frozen=True)
class Repository:
    """What the cache holds of the model `id`, whether anything or nothing."""

    cache: Path
    id: str

    @property
    def folder(self) -> Path:
        return self.cache / f"models--{self.id.replace('/', '--')}"

    def blob(self, digest: str) -> Path:
        return self.folder / "blobs" / digest

    def partial(self, digest: str) -> Path:
        """What arrived of a blob so far."""
        return self.folder / "blobs" / f"{digest}{PARTIAL}"

    def lock(self, digest: str) -> Path:
        """Where huggingface_hub locks the same blob."""
        return self.cache / ".locks" / self.folder.name / f"{digest}.lock"

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def commits(self) -> list[str]:
        """Of the snapshots, whole or not, the newest first."""
        found = _entries(self.folder / "snapshots")
        found = [path for path in found if COMMIT.fullmatch(path.name) and path.is_dir()]
        return [path.name for path in sorted(found, key=_changed, reverse=True)]

    def find(self, revision: str) -> Path | None:
        """The snapshot of a branch, a tag, or a commit that may be shortened."""
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
        """Of files that were not fetched to the end."""
        parts = (path for path in _entries(self.folder / "blobs") if path.name.endswith(PARTIAL))
        return sum(map(file_nbytes, parts))

    def publish(self, commit: str, digests: Mapping[str, str], revision: str) -> None:
        """Link the names of `digests`, config.json among them, to their blobs, which are there.

        A folder without a config is no model, so the config's name goes first and comes last. Raises OSError.
        """
        folder = self.snapshot(commit)
        links = {folder / name: self.blob(digest) for name, digest in digests.items()}
        config = folder / CONFIG_NAME
        if not all(_leads(link, blob) for link, blob in links.items()):
            _withdraw(config, links[config])
            for link, blob in sorted(links.items(), key=lambda item: item[0] == config):
                _link(link, blob)
        if revision != commit:
            ref = self.folder / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_whole(ref, commit)

    def delete(self, commit: str) -> None:
        """The snapshot and what it alone needs; with the last snapshot all of the model. Raises OSError."""
        if commit in self.commits():
            from huggingface_hub import scan_cache_dir
            from huggingface_hub.utils import logging as library_log

            library_log.set_verbosity_error()  # what fails is raised below
            known = scan_cache_dir(self.cache)
            # another model may have the same commit
            mine = frozenset(repo for repo in known.repos if repo.repo_path.name == self.folder.name)
            replace(known, repos=mine).delete_revisions(commit).execute()
        if set(self.commits()) <= {commit} and self.folder.exists():
            shutil.rmtree(self.folder)
            shutil.rmtree(self.cache / ".locks" / self.folder.name, ignore_errors=True)
        if commit in self.commits():
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(self.snapshot(commit)))


def repositories(cache: Path) -> Iterator[Repository]:
    """Every model that the cache has anything of, by id."""
    for path in sorted(_entries(cache)):
        found = FOLDER.fullmatch(path.name)
        if found and path.is_dir():
            yield Repository(cache, "/".join(found.groups()))


def repository_of(snapshot: Path) -> Repository:
    """The one that a snapshot is in, or whose own folder it is. Raises UsageError for any other folder."""
    for folder in (snapshot, *snapshot.parents):
        found = FOLDER.fullmatch(folder.name)
        if found:
            return Repository(folder.parent, "/".join(found.groups()))
    raise UsageError(f"{snapshot} is in no cache of the hub")


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def file_nbytes(path: Path) -> int:
    """0 where there is no file."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def _leads(link: Path, blob: Path) -> bool:
    """On a disk without links a name is the file itself, and there is no blob."""
    return link.samefile(blob) if link.exists() and blob.exists() else link.exists()


def _withdraw(config: Path, blob: Path) -> None:
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
    except OSError:  # a disk without links
        blob.replace(link)
    else:
        new.replace(link)
