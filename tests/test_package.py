"""The package: one version, the licence, and a checkout that imports as the wheel does."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import qchat
import qchat.core
from qchat import tui
from tests.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_has_one_source():
    source = PROJECT["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{qchat.__version__}"' in (ROOT / source).read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", qchat.__version__)
    assert tui.__version__ == qchat.__version__
    assert PROJECT["project"]["dynamic"] == ["version"]


def test_the_changelog_begins_with_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[?([\d.]+)", changelog, re.MULTILINE)
    assert newest and newest[1] == qchat.__version__


def test_a_checkout_imports_its_own_files_by_their_real_paths():
    """The links in .dev are for type checkers; a traceback should name the file that one edits."""
    assert [Path(path) for path in qchat.__path__] == [ROOT]
    assert Path(qchat.core.__file__) == ROOT / "core" / "__init__.py"


def test_importing_the_package_imports_nothing_else():
    script = "import sys, qchat; print(*(name for name in sys.modules if name.startswith(('qchat.', 'mlx'))))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(ROOT / ".dev"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ""


def test_every_file_that_the_build_names_is_there():
    targets = PROJECT["tool"]["hatch"]["build"]["targets"]
    named = {*targets["wheel"]["only-include"], *targets["sdist"]["only-include"]}
    named |= {*PROJECT["project"]["license-files"], PROJECT["project"]["readme"]}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
