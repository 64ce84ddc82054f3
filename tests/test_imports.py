"""Import rules, read from the source; the module maps of the READMEs; two rules for the tests themselves."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate
from pathlib import Path

import pytest

import qchat.core

ROOT = Path(__file__).parents[1]
TERMINAL_LIBRARIES = {"textual", "rich", "prompt_toolkit", "curses", "readline", "pygments"}
# what a distribution's modules are called where that is not its own name
MODULES_OF = {
    "huggingface-hub": "huggingface_hub",
    "pillow": "PIL",
    "markdown-it-py": "markdown_it",
    "prompt-toolkit": "prompt_toolkit",
    "scipy-openblas32": "scipy_openblas32",
}
# where the packages of each extra may be imported
EXTRAS = {
    "tui/serve": "serve",
    "core/calls/answer_schema.py": "structured",
    "tui/tools/mcp_server.py": "tools",
    "core/generation/constraint.py": "structured",
    "core/vision": "vision",
}
# modules of core that the front end may import, besides the names that `qchat.core` itself makes public
PUBLIC_MODULES = {
    "conversation.summary",
    "conversion.card",
    "conversion.results",
    "errors",
    "events",
    "hub.catalog",
    "hub.download",
    "hub.library",
    "hub.listing",
    "hub.names",
    "machine.files",
    "measuring.results",
    "model.memory_figures",
    "quant.results",
    "quoting",
    "storage.records",
    "storage.store",
    "vision.picture",
    "worker.protocol",
    "worker.wire",
}
WITHOUT_MLX = (
    "errors",
    "events",
    "checkpoint.config",
    "text.tokenizer",
    "text.template",
    "hub.library",
    "worker.wire",
)
MAX_MODULES, MAX_LINES = 14, 500


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


@cache
def import_statements(source: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(path: Path) -> Iterator[Import]:
    """Yield every import statement, inside functions and for type checkers too."""
    for node in import_statements(path.read_text(encoding="utf-8")):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, ()) for alias in node.names)
        else:
            yield Import(_absolute(path, node), tuple(alias.name for alias in node.names))


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


def plant(root: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the checks read `files` below `root` instead of the checkout."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", root)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_a_planted_import_is_found_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    planted = {
        "core/plain.py": "import rich.text",
        "core/lazy.py": "def f():\n    from rich import text",
        "core/relative.py": "from ..tui.cli import main",
        "core/package.py": "from .. import tui",
        "core/kernels/deep.py": "from ...tui import cli",
        "core/types.py": "if TYPE_CHECKING:\n    import rich",
        "core/fine.py": "from .tui import x\nimport richer",
    }
    plant(tmp_path, planted, monkeypatch)
    assert offenders("core/**/*.py", {"qchat.tui", "rich"}) == sorted(planted.keys() - {"core/fine.py"})


def test_core_never_imports_a_front_end_or_a_terminal_library():
    assert offenders("core/**/*.py", {"qchat.tui", *TERMINAL_LIBRARIES}) == []


def test_only_the_backend_imports_mlx():
    """It opens a BLAS first; whoever came before it would pin the slow one."""
    assert offenders("core/**/*.py", {"mlx"}) == ["core/machine/backend.py"]
    assert offenders("tui/**/*.py", {"mlx"}) == []


@pytest.mark.parametrize(
    ("pattern", "forbidden"),
    [
        ("tui/widgets/**/*.py", {"qchat.tui.screens"}),
        ("tui/screens/*.py", {"qchat.tui.screens.app"}),
        ("tui/plain/*.py", {"textual"}),
        ("tui/commands/*.py", {"textual"}),
        ("tui/user/settings.py", {"textual"}),
        ("tui/cli/oneshot.py", TERMINAL_LIBRARIES),
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
                taken = item.module.removeprefix("qchat.core.")
                modules = {taken, *(f"{taken}.{name}" for name in item.names)}
                assert modules & PUBLIC_MODULES, f"{path} imports {item.module}"


def declared_modules(extra: str | None = None) -> set[str]:
    """The modules of qchat's dependencies, or of those of an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"][extra] if extra else project["dependencies"]
    names = {re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower() for requirement in wanted}
    return {MODULES_OF.get(name, name) for name in names}


def test_every_other_package_is_a_declared_dependency():
    """Also keeps out numpy, torch, transformers and mlx-lm, which only tests may have."""
    allowed = declared_modules() | sys.stdlib_module_names | {"qchat"}
    for path in [*sources("core"), *sources("tui")]:
        extras = [extra for place, extra in EXTRAS.items() if path.is_relative_to(ROOT / place)]
        optional = set().union(*map(declared_modules, extras))
        assert {top(item.module) for item in imports(path)} <= allowed | optional, path


def test_values_and_text_are_read_without_mlx():
    modules = [f"qchat.core.{name}" for name in WITHOUT_MLX]
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


def circle(package: str) -> str:
    """Name the modules of a circle of imports; empty if there is none."""
    try:
        TopologicalSorter(dependencies(package)).prepare()
    except CycleError as error:
        return " imports ".join(error.args[1])
    return ""


@pytest.mark.parametrize("package", ["core", "tui"])
def test_no_modules_import_each_other_in_a_circle(package: str):
    assert circle(package) == ""


def test_a_planted_circle_for_type_checkers_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {
        "core/text/one.py": "from .two import x",
        "core/text/two.py": "if TYPE_CHECKING:\n    from .one import y",
    }
    plant(tmp_path, files, monkeypatch)
    assert "qchat.core.text.one imports qchat.core.text.two" in circle("core") + circle("core")[::-1] or (
        "qchat.core.text.two imports qchat.core.text.one" in circle("core")
    )


# --- the READMEs of core and tui: floors of packages, and a line for every package and module ---


def table_rows(readme: str, pattern: str) -> list[tuple[str, ...]]:
    """Return the groups of `pattern` in the table rows of a README of the checkout."""
    text = (Path(__file__).parents[1] / readme).read_text(encoding="utf-8")
    return [match.groups() for match in re.finditer(rf"^\| *{pattern}", text, re.MULTILINE)]


@cache
def floors(whole: str) -> dict[str, int]:
    """Return the floor of every package of core or tui."""
    rows = table_rows(f"{whole}/README.md", r"(\d+) *\| *`(\w+)/`")
    return {package: int(floor) for floor, package in rows}


def package_of(module: str, known: Set[str]) -> str | None:
    """Return the one of `known` that a full module name belongs to; None for modules at the top."""
    parts = module.split(".")
    return parts[2] if len(parts) > 2 and parts[2] in known else None


def upward_imports(whole: str) -> list[str]:
    """Name every import from a package of core or tui to one that is not on a lower floor."""
    found, floor = [], floors(whole)
    entry_points = {f"qchat.{whole}", f"qchat.{whole}.__main__"}
    for module, targets in dependencies(whole).items():
        for target in targets:
            here, there = package_of(module, floor.keys()), package_of(target, floor.keys())
            if here and there and here != there and floor[there] >= floor[here]:
                found.append(f"{module} (floor {floor[here]}) imports {target} (floor {floor[there]})")
            if there and not here and module not in entry_points:
                found.append(f"{module} (floor 1) imports {target} (floor {floor[there]})")
    return sorted(found)


@pytest.mark.parametrize("whole", ["core", "tui"])
def test_packages_import_only_lower_ones(whole: str):
    assert upward_imports(whole) == []


@pytest.mark.parametrize("whole", ["core", "tui"])
def test_every_package_has_a_floor(whole: str):
    assert floors(whole).keys() == {package for package in packages_of(whole) if "/" not in package}


def test_a_planted_upward_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {
        "core/__init__.py": "",
        "core/errors.py": "from .machine import files",
        "core/machine/__init__.py": "",
        "core/machine/files.py": "if TYPE_CHECKING:\n    from ..worker.process import Worker",
        "core/worker/__init__.py": "",
        "core/worker/process.py": "from ..machine.files import x",
    }
    plant(tmp_path, files, monkeypatch)
    assert [line.split(" (")[0] for line in upward_imports("core")] == [
        "qchat.core.errors",
        "qchat.core.machine.files",
    ]


def test_a_planted_upward_import_of_the_front_end_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {
        "tui/__init__.py": "",
        "tui/__main__.py": "from .cli import main",
        "tui/cli/__init__.py": "",
        "tui/cli/main.py": "from ..tasks import base",
        "tui/tasks/__init__.py": "",
        "tui/tasks/base.py": "def late():\n    from ..cli.main import main",
    }
    plant(tmp_path, files, monkeypatch)
    (found,) = upward_imports("tui")
    assert found.startswith("qchat.tui.tasks.base (floor ")


def modules_of(package: str) -> set[str]:
    """Return the modules of core or tui as paths below it, without packages' own files."""
    paths = (path.relative_to(ROOT / package) for path in sources(package))
    return {path.as_posix() for path in paths if path.name not in ("__init__.py", "__main__.py")}


def packages_of(package: str) -> set[str]:
    """Return the packages inside core or tui as paths below it."""
    paths = (path.parent.relative_to(ROOT / package).as_posix() for path in sources(package))
    return {path for path in paths if path != "."}


@pytest.mark.parametrize("package", ["core", "tui"])
def test_the_map_names_every_module_once_and_no_other(package: str):
    listed = [name for (name,) in table_rows(f"{package}/README.md", r"`([\w/]+\.py)` \|")]
    entry_point = {"__main__.py"} & {path.name for path in (ROOT / package).iterdir()}
    assert sorted(listed) == sorted(modules_of(package) | entry_point)


@pytest.mark.parametrize("package", ["core", "tui"])
def test_the_map_names_every_package_once_and_no_other(package: str):
    listed = [name for (name,) in table_rows(f"{package}/README.md", r"(?:\d+ *\| *)?`([\w/]+)/` \|")]
    assert sorted(listed) == sorted(packages_of(package))


def test_a_package_has_few_modules_and_a_module_few_lines():
    for package in floors("core"):
        modules = [name for name in modules_of("core") if name.startswith(f"{package}/")]
        assert len(modules) <= MAX_MODULES, package
    for path in sources("core"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES, path


# --- packages of core: the names that others import are those that the package's docstring calls public ---


def imported_names(package: str) -> set[str]:
    """Return the names that files outside a package of core import from it."""
    found: set[str] = set()
    for path in [*sources("core"), *sources("tui")]:
        if path.is_relative_to(ROOT / "core" / package) or path == ROOT / "core/__init__.py":
            continue
        for item in imports(path):
            if f"{item.module}.".startswith(f"qchat.core.{package}."):
                found |= set(item.names)
    return found


def public_names(package: str) -> set[str]:
    """Return the names that a package's docstring lists as public."""
    text = ast.get_docstring(ast.parse((ROOT / "core" / package / "__init__.py").read_text())) or ""
    return set(re.findall(r"\w+", text.partition("Public names:")[2]))


@pytest.mark.parametrize("package", sorted(floors("core")))
def test_packages_import_only_public_names_of_each_other(package: str):
    assert imported_names(package) == public_names(package)


# --- the tests: one name per class, one way to run a coroutine ---


def repeated_classes() -> dict[str, list[str]]:
    """Return the class names that the tests define more than once, and the files that define them."""
    found: dict[str, list[str]] = {}
    for path in sources("tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    return {name: files for name, files in found.items() if len(files) > 1}


def test_no_class_name_is_defined_twice_in_the_tests():
    assert repeated_classes() == {}


def test_a_planted_second_class_is_found_even_inside_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = {
        "tests/one.py": "class Stage:\n    class Inner: ...",
        "tests/tui/two.py": "class Other: ...",
        "tests/tui/test_three.py": "def test():\n    class Stage: ...",
    }
    plant(tmp_path, files, monkeypatch)
    assert repeated_classes() == {"Stage": ["tests/one.py", "tests/tui/test_three.py"]}


def starts_event_loop(path: Path) -> bool:
    """Tell whether a file calls one of the functions of asyncio that run a coroutine to its end."""
    runners = {"asyncio.run", "asyncio.Runner", "asyncio.new_event_loop"}
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    used = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    return not runners.isdisjoint(used.union(*map(named, imports(path))))


def test_every_test_runs_its_coroutines_with_the_same_function():
    """Programs, which are in no folder of tests, have no time limit."""
    files = [*sources("tests/core"), *sources("tests/tui"), *(ROOT / "tests").glob("test_*.py")]
    assert [path for path in files if starts_event_loop(path)] == []
    assert starts_event_loop(ROOT / "tests/run_async.py")
