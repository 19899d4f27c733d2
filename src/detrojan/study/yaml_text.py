"""Reads YAML that anybody may have written: plain values only, each key once, nothing run, nothing guessed.

YAML lets the last of two equal keys win, makes dates of what looks like one, and can hold bytes, objects
and structures that contain themselves. Here each is refused, with the line in which it stands.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MOST_NESTED = 40  # a study nests 8 deep
MOST_VALUES = 1_000_000  # aliases can make a short file endless
PLAIN = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))
# Snakemake would run the Python that stands in such a file, in a dry run too.
TEMPLATE = "__use_yte__"


class _Loader(yaml.SafeLoader):
    """YAML's own loader, which is strict about what it is given."""


# A date is text here: no setting is one, and JSON has none.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read(path: Path) -> dict[str, Any]:
    """Return the keys and values of a file in YAML or JSON, UTF-8.

    Raises:
        ValueError: it can't be read, or holds what it should not; the message names file and line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    return parse(content, str(path))


def parse(content: bytes, name: str) -> dict[str, Any]:
    """Return the keys and values of a file's ``content``; see :func:`read`."""
    text = _text(content, name)
    try:
        found = json.loads(text, object_pairs_hook=_Pairs)
    except RecursionError:
        raise ValueError(f"{name}: nested too deeply for a study file") from None
    except ValueError:
        found = _yaml(text, name)
    else:
        found = _plain(found, name, 1)
    if not isinstance(found, dict):
        raise ValueError(f"{name}: no keys with values at its top, such as `key: value`")
    if TEMPLATE in found:
        raise ValueError(
            f"{name}: {TEMPLATE} would run the Python that stands in the file; write the values out"
        )
    return found


def _text(content: bytes, name: str) -> str:
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line}: no UTF-8; save the file as UTF-8") from None


# --- JSON ------------------------------------------------------------------------------------------


class _Pairs(list[tuple[str, Any]]):
    """The keys and values of an object, as they stand in the file."""


def _plain(value: Any, name: str, depth: int) -> Any:
    if depth > MOST_NESTED:
        raise ValueError(f"{name}: nested more than {MOST_NESTED} deep")
    if isinstance(value, _Pairs):
        found: dict[str, Any] = {}
        for key, inner in value:
            if key in found:
                raise ValueError(f"{name}: key {key!r} stands there twice")
            found[key] = _plain(inner, name, depth + 1)
        return found
    return [_plain(inner, name, depth + 1) for inner in value] if isinstance(value, list) else value


# --- YAML ------------------------------------------------------------------------------------------


def _yaml(text: str, name: str) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        for count, _ in enumerate(_checked(node, name, ())):
            if count > MOST_VALUES:
                raise ValueError(f"{name}: its aliases (*name) stand for more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{name}{where}: {_one_line(error.problem or error.context)}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        problem = "nested too deeply" if isinstance(error, RecursionError) else _one_line(error)
        raise ValueError(f"{name}: {problem}") from None
    finally:
        if loader:
            loader.dispose()


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())


def _checked(node: yaml.Node, name: str, above: tuple[yaml.Node, ...]) -> Iterator[yaml.Node]:
    """Yield ``node`` and all within, as often as aliases repeat them; refuse what is not plain."""
    where = f"{name}, line {node.start_mark.line + 1}"
    if len(above) > MOST_NESTED:
        raise ValueError(f"{where}: nested more than {MOST_NESTED} deep")
    if any(node is other for other in above):
        raise ValueError(f"{where}: an alias (*name) within what it stands for")
    if node.tag not in PLAIN and node.tag != "tag:yaml.org,2002:merge":
        shown = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise ValueError(
            f"{where}: {shown} is no plain value; write text, a number, a list, or keys with values"
        )
    yield node
    if isinstance(node, yaml.MappingNode):
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                raise ValueError(f"{name}, line {line}: a list or keys with values in place of a key")
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise ValueError(f"{name}, line {line}: key {key.value!r} stands there twice")
            seen.add((key.tag, key.value))
            yield from _checked(key, name, (*above, node))
            yield from _checked(value, name, (*above, node))
    elif isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            yield from _checked(inner, name, (*above, node))
