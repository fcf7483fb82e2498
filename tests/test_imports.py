"""The house: rooms in one order, imports that run one way, names that nobody confuses, no torch before it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "calmlm"

# Lowest first: a room (a folder, or a file at the root) imports from itself and from those below it.
ROOMS = (
    "errors config connectors tokens bases state files readers modeling decoding causal_lm exporting data composing "
    "answering controls communication training evaluation serving ui experiments baselines comparison demo commands cli"
).split()
# The files that each experiment has: one name, one meaning in every folder of calmlm.experiments.
IN_EACH_EXPERIMENT = {"joined", "measures", "presets", "pretraining", "report", "run", "tokenizer", "words", "world"}
HEIGHT = {name: height for height, name in enumerate(ROOMS)}
# Whatever lies above all rooms is no module of one.
MODULES = sorted({*SOURCE.rglob("*.py")} - {SOURCE / "__init__.py", SOURCE / "__main__.py"})


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in the file the import stands."""
    package = ["calmlm", *path.relative_to(SOURCE).parent.parts]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from calmlm import data` imports a module, `from calmlm.errors import DataError` a name of one.
            names.update(f"{module}.{alias.name}" if module == "calmlm" else module for alias in node.names)
    return names


def room(module: str) -> str:
    """The part of the package that a dotted name belongs to: calmlm.data.jsonl -> data."""
    return module.split(".")[1]


def test_every_module_has_a_room() -> None:
    unknown = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in MODULES} - set(HEIGHT)
    assert not unknown, f"no room in tests/test_imports.py for: {sorted(unknown)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    inside = {name for name in imported_modules(path) if name.startswith("calmlm.") and room(name) in HEIGHT}
    upward = sorted(name for name in inside if HEIGHT[room(name)] > HEIGHT[own])
    assert not upward, f"{own} imports from above: {upward}"


def imported_at_once(path: Path) -> set[str]:
    """The modules of calmlm that a file imports when it is imported itself, as paths below the package."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("calmlm."):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names.update(name if is_module(name) else str(node.module) for name in whole)
    return names


def is_module(name: str) -> bool:
    path = SOURCE.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_no_two_modules_import_each_other() -> None:
    graph = {}
    for path in MODULES:
        parts = path.relative_to(SOURCE).with_suffix("").parts
        inits = parts[-1] == "__init__"
        graph[".".join(["calmlm", *(parts[:-1] if inits else parts)])] = imported_at_once(path)
    # Importing one file of a room imports the room's __init__ first, which is not counted: it holds no code.
    assert list(TopologicalSorter(graph).static_order())


def test_the_root_stays_small() -> None:
    files = sorted(path.name for path in SOURCE.iterdir() if path.is_file())
    assert len(files) <= 9, files


def stem(name: str) -> str:
    """A name without the ending that makes it another form of a word: rewriter and rewriting have one stem."""
    return re.sub(r"(ings?|ers?|ors?|ions?|ents?|eds?|e?s|e)$", "", name)


def test_stems() -> None:
    for pair in (
        "connector connectors",
        "generating generation",
        "rewriting rewriter",
        "encoder encoding",
        "base bases",
    ):
        one, other = pair.split()
        assert stem(one) == stem(other), pair
    assert stem("drafting") != stem("drawn")


def test_no_two_names_are_alike() -> None:
    modules = [path for path in MODULES if path.name != "__init__.py"]
    rooms = {path for path in SOURCE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    names = [path.stem for path in modules if not is_shared(path)] + [room.name for room in rooms]
    names += sorted(IN_EACH_EXPERIMENT)
    found = Counter(map(stem, names))
    alike = sorted(name for name in names if found[stem(name)] > 1)
    assert not alike, f"names that a reader would confuse: {alike}"


def is_shared(path: Path) -> bool:
    """Whether a file has one of the names that mean the same in every experiment."""
    return path.parent.parent == SOURCE / "experiments" and path.stem in IN_EACH_EXPERIMENT


def test_contributing_shows_the_rooms_in_their_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"^    errors < .*?$\n\n", text, re.MULTILINE | re.DOTALL)
    assert block, "CONTRIBUTING.md shows no order of rooms"
    assert block[0].replace("<", " ").split() == ROOMS


def test_each_test_folder_is_a_room() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(ROOMS)


@pytest.mark.parametrize("path", sorted((SOURCE / "connectors").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_the_maths_knows_only_torch(path: Path) -> None:
    imported = imported_modules(path)
    outside = {name.split(".")[0] for name in imported}
    outside -= set(sys.stdlib_module_names) | {"torch"}
    inside = {name for name in imported if name.startswith("calmlm")}
    assert outside <= {"calmlm"}
    assert all(name == "calmlm.errors" or name.startswith("calmlm.connectors") for name in inside)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = "[name for name in ('torch', 'transformers', 'datasets', 'trl') if name in sys.modules]"


def test_importing_calmlm_imports_no_torch() -> None:
    assert run_python(f"import sys, calmlm; print({HEAVY})") == "[]"


def test_help_imports_no_torch() -> None:
    code = f"import sys, calmlm.cli; code = calmlm.cli.main(['--help']); print(); print(code, {HEAVY})"
    assert run_python(code).splitlines()[-1] == "0 []"


def test_public_names_resolve() -> None:
    code = "import calmlm; print([name for name in calmlm.__all__ if not hasattr(calmlm, name)])"
    assert run_python(code) == "[]"


def test_public_names_survive_imports_of_their_modules() -> None:
    """A public function must not share its name with a module: importing the module would put it in the way."""
    code = (
        "import importlib, calmlm; "
        "[importlib.import_module(home) for home in calmlm._HOMES.values()]; "
        "print([name for name in calmlm._HOMES if not callable(getattr(calmlm, name))])"
    )
    assert run_python(code) == "[]"


def test_unknown_names_are_attribute_errors() -> None:
    code = "import calmlm\ntry: calmlm.nonsense\nexcept AttributeError as error: print(error)"
    assert run_python(code) == "module 'calmlm' has no attribute 'nonsense'"
