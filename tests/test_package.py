"""The house itself under test: one copy of each module, every file in the wheel, every door opens, every wall stands."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parent.parent
FOLDERS = ("bench", "methods", "rewards", "tasks", "leaderboards")
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))
GROUPS: dict[str, dict[str, str]] = PROJECT["project"]["entry-points"] | {
    "console_scripts": PROJECT["project"]["scripts"]
}
HEAVY = "torch diffusers transformers accelerate peft pandas pyarrow scipy matplotlib rapidocr onnxruntime cv2".split()


def tree() -> list[str]:
    """Every file of the repository that git keeps or would keep; without git, every file that is no leftover."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        listed = [str(path.relative_to(REPO)) for folder in FOLDERS for path in (REPO / folder).rglob("*")]
        listed += [path.name for path in REPO.iterdir()]
    return sorted(name for name in set(listed) if "__pycache__" not in name and (REPO / name).is_file())


def python_files(*folders: str) -> list[str]:
    return [name for name in tree() if name.endswith(".py") and name.partition("/")[0] in folders]


def module_name(file: str) -> str:
    return ".".join(["gpobench", *Path(file).with_suffix("").parts]).removesuffix(".__init__")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree in a folder called gpobench, so that `gpobench` imports from the folder above it."""
    target = tmp_path_factory.mktemp("copy") / "gpobench"
    for name in tree():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, target / name)
    return target


# -- one copy of each module ------------------------------------------------------------------------------------------


def test_there_is_one_gpobench_on_the_path() -> None:
    specs = [PathFinder.find_spec("gpobench", [entry]) for entry in sys.path]
    origins = {spec.origin for spec in specs if spec is not None}
    assert origins <= {str(REPO / "__init__.py")}


def test_every_module_is_imported_from_its_file() -> None:
    for file in ["__init__.py", *python_files(*FOLDERS)]:
        spec = importlib.util.find_spec(module_name(file))
        assert spec is not None and spec.origin is not None, f"{file} cannot be imported as {module_name(file)}"
        assert Path(spec.origin).resolve() == REPO / file


def test_every_folder_with_modules_is_a_declared_package() -> None:
    folders = {Path(file).parent for file in python_files(*FOLDERS)} | {Path(".")}
    assert {".".join(["gpobench", *folder.parts]) for folder in folders} == set(
        PROJECT["tool"]["setuptools"]["packages"]
    )
    assert not [folder for folder in folders if not (REPO / folder / "__init__.py").is_file()]


def test_the_root_package_is_bare() -> None:
    body = ast.parse((REPO / "__init__.py").read_text("utf-8")).body
    assert [type(node) for node in body] == [ast.Expr, ast.Assign]


def test_the_version_is_the_installed_one() -> None:
    import gpobench

    assert distribution("gpobench").version == gpobench.__version__


# -- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the wheel, relative to the package, without its metadata."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(out), str(copy)], check=True, capture_output=True)
    (file,) = out.glob("gpobench-*.whl")
    names = zipfile.ZipFile(file).namelist()
    assert all(name.startswith("gpobench") for name in names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    return {name.removeprefix("gpobench/") for name in names if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: set[str]) -> None:
    expected = {"__init__.py", "__main__.py", "py.typed"} | {
        name for name in tree() if name.partition("/")[0] in FOLDERS
    }
    assert not expected - wheel, "not in the wheel: declare them under package-data, or move them out of the package"
    assert not wheel - expected, "stray files in the wheel"


def test_every_package_data_pattern_is_for_a_declared_package() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    assert set(setuptools["package-data"]) <= set(setuptools["packages"])
    assert setuptools["include-package-data"] is False


# -- the doors --------------------------------------------------------------------------------------------------------


def test_the_installed_entry_points_are_the_declared_ones() -> None:
    installed = {(point.group, point.name, point.value) for point in distribution("gpobench").entry_points}
    declared = {(group, name, value) for group, names in GROUPS.items() for name, value in names.items()}
    assert installed == declared, "install again: pip install -e ."


@pytest.mark.parametrize(
    "point", distribution("gpobench").entry_points, ids=lambda point: f"{point.group}:{point.name}"
)
def test_every_entry_point_loads(point: importlib.metadata.EntryPoint) -> None:
    assert point.load() is not None


@pytest.mark.parametrize("arguments", [["--help"], ["list"]], ids=" ".join)
def test_a_light_command_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    script = """
import sys
from gpobench.bench.commands.app import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("imported:", *sys.modules, file=sys.stderr)
"""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    imported = set(done.stderr.rpartition("imported:")[2].split())
    assert not imported & set(HEAVY)


# -- the walls --------------------------------------------------------------------------------------------------------


def absolute_imports(source: str) -> Iterator[int]:
    """Lines that import gpobench by its name."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        if any(name.partition(".")[0] == "gpobench" for name in names):
            yield node.lineno


def test_inside_the_package_imports_are_relative() -> None:
    assert list(absolute_imports("import os, gpobench.bench\nfrom gpobench import tasks\nfrom .. import bench")) == [
        1,
        2,
    ]
    found = {file: list(absolute_imports((REPO / file).read_text("utf-8"))) for file in python_files(*FOLDERS)}
    assert not {file: lines for file, lines in found.items() if lines}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder.parent), "COLUMNS": "200"}
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_import_contracts_hold(copy: Path) -> None:
    done = lint_imports(copy)
    assert done.returncode == 0, done.stdout


PLANTED = [
    ("every petal imports the hub, no petal another", {"methods/planted.py": "from ..tasks import ocr"}),
    ("the hub imports no petal", {"bench/commands/app.py": "from ...methods import gpo"}),
    ("no method imports another", {"methods/planted.py": "from . import other", "methods/other.py": ""}),
    ("leaderboards read records, never runs", {"leaderboards/planted.py": "from ..bench.training import rig"}),
    ("the hub's folders are layers", {"bench/errors.py": "from . import budget"}),
    (
        "no import circle anywhere",
        {"rewards/planted.py": "from . import other", "rewards/other.py": "from . import planted"},
    ),
]


@pytest.mark.parametrize(("contract", "files"), PLANTED, ids=[contract for contract, _ in PLANTED])
def test_a_planted_violation_breaks_its_contract(contract: str, files: dict[str, str], copy: Path) -> None:
    before = {file: (copy / file).read_text("utf-8") if (copy / file).exists() else None for file in files}
    try:
        for file, line in files.items():
            (copy / file).write_text(f"{before[file] or ''}\n{line}\n", "utf-8")
        done = lint_imports(copy)
    finally:
        for file, text in before.items():
            if text is None:
                (copy / file).unlink()
            else:
                (copy / file).write_text(text, "utf-8")
    assert done.returncode == 1, done.stdout
    assert re.search(rf"{re.escape(contract)} BROKEN", done.stdout), done.stdout


# -- the style and the set-up -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", python_files(*FOLDERS, "tests", "benchmarks", "docs", "__init__.py"))
def test_the_first_line_is_a_caption(file: str) -> None:
    first = (REPO / file).read_text("utf-8").partition("\n")[0]
    assert re.fullmatch(r'"""[^"\s].*\w\W*[.:?!](""")?', first), f"{file} starts with {first!r}"


def test_the_constraints_pin_every_dependency_and_name_no_place() -> None:
    lines = (REPO / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") and pin.url is None for pin in pins)
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(pinned) == len(pins)
    extras = PROJECT["project"]["optional-dependencies"]
    own = [Requirement(line) for line in extras["dev"] if Requirement(line).name == "gpobench"]
    engines = [line for one in own for extra in one.extras for line in extras[extra]]
    assert len(own) == 1 and engines  # dev brings every engine
    for line in PROJECT["project"]["dependencies"] + extras["dev"] + engines:
        wanted = Requirement(line)
        if wanted.name == "gpobench":
            continue
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), line


def test_continuous_integration_is_make_test() -> None:
    assert (REPO / ".ci/run").stat().st_mode & 0o111
    assert (REPO / ".ci/run").read_text("utf-8").splitlines()[-1] == "make test"
