"""Who may import whom, read from the source, and the README's map of modules compared with the files."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Set
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate
from pathlib import Path

import pytest

import qchat.core

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TERMINAL_LIBRARIES = {"textual", "rich", "prompt_toolkit", "curses", "readline", "pygments"}
# what a distribution's modules are called where that is not its own name
MODULES_OF = {
    "huggingface-hub": "huggingface_hub",
    "markdown-it-py": "markdown_it",
    "prompt-toolkit": "prompt_toolkit",
    "scipy-openblas32": "scipy_openblas32",
}
# of core, besides the names that `qchat.core` itself makes public
PUBLIC_MODULES = {
    "errors",
    "events",
    "protocol",
    "records",
    "store",
    "catalog",
    "library",
    "hub",
    "modelcard",
}
WITHOUT_MLX = ("errors", "events", "config", "tokenizer", "chat")


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name, and the names taken from it."""

    module: str
    names: tuple[str, ...]


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("qchat", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imports(path: Path) -> Iterator[Import]:
    """Every import statement, inside functions too; those for type checkers only do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {id(node) for guard in ast.walk(tree) if _for_types(guard) for node in ast.walk(guard)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield Import(_absolute(path, node), tuple(alias.name for alias in node.names))


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = ("qchat", *path.relative_to(ROOT).parts[:-1])
    base = package[: len(package) - node.level + 1]
    return ".".join((*base, node.module) if node.module else base)


def top(module: str) -> str:
    return module.partition(".")[0]


def named(item: Import) -> set[str]:
    """`from . import x` names a module, or a name in one."""
    return {item.module, *(f"{item.module}.{name}" for name in item.names)}


def with_packages(modules: set[str]) -> set[str]:
    return {part for name in modules for part in accumulate(name.split("."), "{}.{}".format)}


def offenders(pattern: str, forbidden: set[str]) -> list[str]:
    """The files that match `pattern` and import something forbidden."""
    return [
        path.relative_to(ROOT).as_posix()
        for path in sorted(ROOT.glob(pattern))
        if any(forbidden & with_packages(named(item)) for item in imports(path))
    ]


def test_a_planted_import_is_found_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    planted = {
        "core/plain.py": "import rich.text",
        "core/lazy.py": "def f():\n    from rich import text",
        "core/relative.py": "from ..tui.cli import main",
        "core/package.py": "from .. import tui",
        "core/kernels/deep.py": "from ...tui import cli",
        "core/types.py": "if TYPE_CHECKING:\n    import rich",
        "core/fine.py": "from .tui import x\nimport richer",
    }
    for name, text in planted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert offenders("core/**/*.py", {"qchat.tui", "rich"}) == sorted(
        planted.keys() - {"core/types.py", "core/fine.py"}
    )


def test_core_never_imports_a_front_end_or_a_terminal_library():
    assert offenders("core/**/*.py", {"qchat.tui", *TERMINAL_LIBRARIES}) == []


def test_only_the_backend_imports_mlx():
    """It opens a BLAS first; whoever came before it would pin the slow one."""
    assert offenders("core/**/*.py", {"mlx"}) == ["core/backend.py"]
    assert offenders("tui/**/*.py", {"mlx"}) == []


@pytest.mark.parametrize(
    ("pattern", "forbidden"),
    [
        ("tui/widgets/*.py", {"qchat.tui.screens", "qchat.tui.app"}),
        ("tui/screens/*.py", {"qchat.tui.app"}),
        ("tui/repl.py", {"textual"}),
        ("tui/commands/*.py", {"textual"}),
        ("tui/settings.py", {"textual"}),
        ("tui/oneshot.py", TERMINAL_LIBRARIES),
    ],
)
def test_parts_of_the_front_end_import_only_what_is_below_them(pattern: str, forbidden: set[str]):
    assert offenders(pattern, forbidden) == []


def test_the_front_end_uses_only_public_names_of_the_runtime():
    public = {*qchat.core.__all__, *PUBLIC_MODULES}
    for path in sources("tui"):
        for item in imports(path):
            if item.module == "qchat.core":
                assert set(item.names) <= public, path
            elif item.module.startswith("qchat.core."):
                assert item.module.split(".")[2] in PUBLIC_MODULES, path


def declared_modules() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {
        re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower()
        for requirement in project["dependencies"]
    }
    return {MODULES_OF.get(name, name) for name in names}


def test_every_other_package_is_a_declared_dependency():
    """Also keeps out numpy, torch, transformers and mlx-lm, which only tests may have."""
    allowed = declared_modules() | sys.stdlib_module_names | {"qchat"}
    for path in [*sources("core"), *sources("tui")]:
        assert {top(item.module) for item in imports(path)} <= allowed, path


def test_values_and_text_are_read_without_mlx():
    modules = [f"qchat.core.{name}" for name in WITHOUT_MLX if (ROOT / "core" / f"{name}.py").exists()]
    script = f"import sys, {', '.join(modules)}; print(*(m for m in sys.modules if m.split('.')[0] == 'mlx'))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(ROOT / ".dev"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ""


def dependencies(package: str) -> dict[str, set[str]]:
    """Each module of ours and the modules of ours that it imports, packages' own files included."""
    ours = {module_name(path): path for path in sources(package)}
    lazy = {f"qchat.{package}"}  # its names are imported when first used
    return {
        name: {target for item in imports(path) for target in targets(item, ours.keys())} - lazy - {name}
        for name, path in ours.items()
    }


def targets(item: Import, ours: Set[str]) -> set[str]:
    """What an import depends on; of a package whose modules alone are taken, not its own names."""
    found = named(item) & ours
    taken = {f"{item.module}.{name}" for name in item.names}
    return found - {item.module} if taken and taken <= ours else found


@pytest.mark.parametrize("package", ["core", "tui"])
def test_no_modules_import_each_other_in_a_circle(package: str):
    try:
        TopologicalSorter(dependencies(package)).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


# --- the README's map: table rows that begin with `core/NAME.py`, `tui/NAME.py` or a package `core/NAME/` ---


def map_of_modules() -> list[str]:
    return re.findall(
        r"^\| *`((?:core|tui)/[\w/]+(?:\.py|/))`", README.read_text(encoding="utf-8"), re.MULTILINE
    )


readme_exists = pytest.mark.skipif(not README.exists(), reason="there is no README.md")


@readme_exists
def test_the_readme_names_every_module_once_and_no_other():
    listed = map_of_modules()
    packages = tuple(entry for entry in listed if entry.endswith("/"))
    files = [path.relative_to(ROOT).as_posix() for path in [*sources("core"), *sources("tui")]]
    modules = {file for file in files if not file.endswith("__init__.py") and not file.startswith(packages)}
    assert len(listed) == len(set(listed))
    assert {entry for entry in listed if entry.endswith(".py")} == modules
    assert all((ROOT / entry).is_dir() for entry in packages)


@readme_exists
def test_modules_import_only_what_the_readme_lists_above_them():
    places = {entry: place for place, entry in enumerate(map_of_modules()) if entry.startswith("core/")}

    def place(module: str) -> int | None:
        path = module.removeprefix("qchat.").replace(".", "/")
        own = places.get(f"{path}.py")
        return (
            own
            if own is not None
            else next((n for entry, n in places.items() if f"{path}/".startswith(entry)), None)
        )

    for module, targets in dependencies("core").items():
        for target in targets:
            here, there = place(module), place(target)
            if here is not None and there is not None:
                assert there <= here, f"{module} imports {target}, which the README lists below it"
