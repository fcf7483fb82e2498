"""YAML as people expect it: 1e-3 is a number, and a key given twice is a fault."""

from __future__ import annotations

import re
from typing import Any

import yaml

from calmlm.errors import ConfigError


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the floats of YAML 1.2 (PyYAML reads 1e-3 as text) and without silent overwriting."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key, str):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key}' is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper; it puts text in quotes that ``Loader`` would read as a number."""


for kind in (Loader, Dumper):
    kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def dump_yaml(value: Any) -> str:
    """A text from which ``parse_yaml`` reads ``value``."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: the text is no YAML, or gives a key twice.
    """
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        place = f"{source}, line {mark.line + 1}" if mark else source
        raise ConfigError(f"{place}: expected YAML, but it cannot be read ({problem}); mend it.") from None
    except (ValueError, RecursionError) as error:  # a day that no month has, or thousands of brackets
        raise ConfigError(f"{source}: expected YAML, but it cannot be read ({error}); mend it.") from None
