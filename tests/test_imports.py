"""Imports run one way, and `import calmlm` is free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "calmlm"

# Lowest first: a room (a folder, or a file at the root) imports from itself and from those below it.
ROOMS = (
    "errors config connectors tokens bases state files readers modeling decoding causal_lm composing data answering "
    "training evaluation experiments baselines comparison demo cli"
).split()
HEIGHT = {name: height for height, name in enumerate(ROOMS)}
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


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


def test_the_maths_knows_only_torch() -> None:
    imported = imported_modules(SOURCE / "connectors" / "cross_attention.py")
    outside = {name.split(".")[0] for name in imported}
    outside -= set(sys.stdlib_module_names) | {"torch"}
    inside = {name for name in imported if name.startswith("calmlm")}
    assert outside <= {"calmlm"}
    assert inside <= {"calmlm.errors"}


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
