"""Write docs/api.md from docstrings, without importing anything.

python scripts/api.py            # rewrite the page
python scripts/api.py --check    # status 1 if it is behind the code
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"

CONTENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Compose": {"calmlm.composing.making:compose": ()},
    "A composition": {
        "calmlm.causal_lm:CalmForCausalLM": (
            "from_pretrained",
            "save_pretrained",
            "forward",
            "disable_composition",
            "add_augmenting",
            "remove_augmenting",
            "enable_augmenting",
            "disable_augmenting",
            "set_augmenting_prefix",
            "composition_tensors",
            "get_nb_trainable_parameters",
            "print_trainable_parameters",
        ),
        "calmlm.decoding.loops:CalmGenerationMixin": ("generate",),
        "calmlm.decoding.drafting:DraftConfig": (),
        "calmlm.config:CalmConfig": (),
        "calmlm.state.cache:CalmCache": (),
    },
    "Share": {
        "calmlm.files.publishing:Published": ("push_to_hub",),
        "calmlm.exporting:export": (),
        "calmlm.files.leaderboards:write_results": (),
        "calmlm.files.leaderboards:read_results": (),
    },
    "Train": {
        "calmlm.training.schema:load_config": (),
        "calmlm.training.pipeline:train": (),
    },
    "Ask and measure": {
        "calmlm.answering:TextModel": ("load", "write"),
        "calmlm.communication.hearing:listen_to_file": (),
        "calmlm.evaluation.harness:evaluate": (),
    },
    "Errors": {
        "calmlm.errors:CalmError": (),
        "calmlm.errors:ConfigError": (),
        "calmlm.errors:ModelError": (),
        "calmlm.errors:CheckpointError": (),
        "calmlm.errors:DataError": (),
        "calmlm.errors:MissingExtraError": (),
    },
}
"""The sections of the page: what stands in them, and of a class its methods."""

HEAD = """<!-- Written by scripts/api.py from the docstrings; change those, not this. -->

# Python reference

What a user of calmlm calls. Shapes are given as (B, T): rows and positions. What `calmlm` exports is imported on first
use.
"""

Definition = ast.FunctionDef | ast.ClassDef


def find(name: str) -> Definition:
    """The definition that ``module:name`` stands for.

    Raises:
        SystemExit: there is none.
    """
    module, _, wanted = name.partition(":")
    path = ROOT / "src" / Path(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == wanted:
            return node
    raise SystemExit(f"error: expected {wanted} in {source.relative_to(ROOT)}, but it has none; mend CONTENTS.")


def signature(node: ast.FunctionDef, name: str) -> str:
    """A call as it is written, an argument to a line where it is long; ``self`` is left out."""
    arguments = node.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments.args = arguments.args[1:]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    line = f"{name}({ast.unparse(arguments)}){returns}"
    if len(line) <= 100:
        return line
    parts = re.split(r", (?![^\[(]*[\])])", ast.unparse(arguments))
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def prose(text: str) -> str:
    """A docstring as Markdown: sections become lists."""
    text = re.sub(r"``([^`]+)``", r"`\1`", inspect.cleandoc(text))
    parts: list[str] = []
    for block in re.split(r"\n(?=(?:Args|Attributes|Returns|Raises|Yields):\n)", text):
        match = re.match(r"(Args|Attributes|Returns|Raises|Yields):\n", block)
        if match is None:
            parts.append(block.strip())
            continue
        body = inspect.cleandoc(block[match.end() :])
        title = {"Args": "Arguments"}.get(match[1], match[1])
        items = body if match[1] in ("Returns", "Yields") else listed(body)
        parts.append(f"**{title}**\n\n{items}")
    return "\n\n".join(parts)


def listed(body: str) -> str:
    """``name: what`` as a list; what is indented belongs to the line before, and what follows a blank line is text."""
    lines: list[str] = []
    for line in body.splitlines():
        match = re.match(r"([\w*.]+(?:, [\w*.]+)*): (.*)", line)
        if match:
            lines.append(f"- `{match[1]}`: {match[2]}")
        elif line.strip():
            lines.append(f"  {line.strip()}")
        else:
            lines.append("")
    return "\n".join(lines)


def entry(name: str, methods: tuple[str, ...]) -> list[str]:
    """A function, or a class and some of its methods."""
    node = find(name)
    module, _, short = name.partition(":")
    shown = f"calmlm.{short}" if short in exported() else f"{module}.{short}"
    said = ast.get_docstring(node) or ""
    if isinstance(node, ast.FunctionDef):
        return [f"### `{shown}`", f"```text\n{signature(node, short)}\n```", prose(said)]
    parts = [f"### `{shown}`", prose(said)]
    own = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
    for method in methods:
        if method not in own:
            raise SystemExit(f"error: expected {method} in {short}, but it has none; mend CONTENTS.")
        told = ast.get_docstring(own[method])
        if told is None:
            raise SystemExit(f"error: expected a docstring of {short}.{method}, but it has none; write one.")
        parts += [f"#### `{method}`", f"```text\n{signature(own[method], method)}\n```", prose(told)]
    return parts


def exported() -> set[str]:
    """The names that ``calmlm`` itself has."""
    text = (ROOT / "src" / "calmlm" / "__init__.py").read_text(encoding="utf-8")
    listing = next(
        node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    )
    return set(ast.literal_eval(listing))


def page() -> str:
    """The whole page."""
    parts = [HEAD.strip()]
    for title, names in CONTENTS.items():
        parts.append(f"## {title}")
        for name, methods in names.items():
            parts += entry(name, methods)
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> int:
    made = page()
    if arguments == ["--check"]:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
