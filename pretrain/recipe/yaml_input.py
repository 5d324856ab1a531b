"""YAML from outside and back: recipes, experiments, clusters.yaml and the values of overrides.

Everything that is wrong with it is one `RecipeError` that names the place. Numbers are those of YAML 1.2, as everywhere
else: `1e-6` is a number; a key given twice is an error. Aliases and nesting are bounded, or a file of a kilobyte could
stand for a gigabyte.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import RecipeError

_MAXIMUM_BYTES = 1 << 20
_MAXIMUM_DEPTH = 32
_MAXIMUM_ALIASES = 100
_MAXIMUM_NODES = 100_000
# More digits than any budget, seed or size has, and far fewer than Python refuses to convert.
_MAXIMUM_DIGITS = 40
_OTHER_BREAKS = re.compile("[\r\x85\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._aliases = 0
        # How many nodes a node stands for once its aliases are followed.
        self._weights: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        alias = self.check_event(yaml.AliasEvent)
        self._aliases += alias
        self._depth += 1
        if self._depth > _MAXIMUM_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"is nested more than {_MAXIMUM_DEPTH} deep", mark)
        if self._aliases > _MAXIMUM_ALIASES:
            raise yaml.composer.ComposerError(None, None, f"has more than {_MAXIMUM_ALIASES} aliases", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and node not in self._weights:
            if alias:
                raise yaml.composer.ComposerError(None, None, "an alias stands for what it is a part of", mark)
            self._weights[node] = 1 + sum(self._weights[below] for below in _below(node))
            if self._weights[node] > _MAXIMUM_NODES:
                raise yaml.composer.ComposerError(None, None, f"stands for more than {_MAXIMUM_NODES:,} values", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        if "\0" in text or _SURROGATE.search(text):
            raise yaml.constructor.ConstructorError(
                None, None, "text holds a null character or a lone surrogate", node.start_mark
            )
        return text

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(node.value)
        if len(text) > _MAXIMUM_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number has more than {_MAXIMUM_DIGITS} digits", node.start_mark
            )
        return int(text, 16 if "x" in text else 8 if "o" in text else 10)


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _tag(name: str) -> str:
    return f"tag:yaml.org,2002:{name}"


# Text, numbers, true and false, null, lists and mappings: what JSON has. Dates are text, and so are times, which
# YAML 1.1 takes for numbers in base 60 (24:00 would be 1440).
_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag in map(_tag, ("null", "bool", "int", "float", "str", "seq", "map"))
}
_Loader.add_constructor(_tag("int"), _Loader.construct_yaml_int)
_Loader.add_constructor(_tag("str"), _Loader.construct_yaml_str)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in map(_tag, ("null", "bool", "merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_DIGITS = list("-+.0123456789")
_Loader.add_implicit_resolver(_tag("int"), re.compile(r"[-+]?(?:0x[0-9a-fA-F]+|0o[0-7]+|\d[\d_]*)$"), _DIGITS)
_Loader.add_implicit_resolver(
    _tag("float"),
    re.compile(
        r"(?:[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|[-+]?\d[\d_]*[eE][-+]?\d+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    _DIGITS,
)


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what this reader or one of YAML 1.1 would take for something other than text, and writes line
    breaks other than a newline, which single quotes would turn into spaces, as escapes.
    """

    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = '"' if _OTHER_BREAKS.search(text) else None
        return self.represent_scalar(_tag("str"), text, style)


_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.yaml_implicit_resolvers = {
    first: resolvers + _Loader.yaml_implicit_resolvers.get(first, [])
    for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
}


def write_yaml(values: Any) -> str:
    """Plain values as YAML that `parse_yaml` reads back unchanged."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, where: object) -> Any:
    """The value of a YAML text; `where` begins the message when there is none.

    Raises:
        RecipeError: not YAML; a key given twice; too many aliases, levels, values or digits.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError) as error:
        # The last two are a tag on a value that is not of its kind, such as `!!bool x`.
        problem = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(f"{where}: cannot be read as YAML: {problem}") from None


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The value of a YAML file.

    Raises:
        FileNotFoundError: there is no such file; only the caller knows what to do about it.
        RecipeError: as `parse_yaml`; or the file cannot be read, is no UTF-8, or is far larger than such a file is.
    """
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(_MAXIMUM_BYTES + 1)
        if len(content) > _MAXIMUM_BYTES:
            raise RecipeError(f"{path}: holds more than {_MAXIMUM_BYTES:,} bytes, which no recipe does.")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML: {error}") from None
    return parse_yaml(text, path)
