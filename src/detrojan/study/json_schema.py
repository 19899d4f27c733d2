"""The JSON schema of study files, by which editors complete and check them.

It has the fields of every method and source, read from their source code: nothing here imports torch. What
needs more than a file's own words, such as a name that another section declares, only the workflow checks.
"""

import json
from typing import Any

from pydantic import BaseModel

from detrojan import registry
from detrojan.cells import NO_METHOD
from detrojan.settings import Optimization
from detrojan.study import networks
from detrojan.study.schema import PROTOCOLS, SEARCHED, SECTIONS, Settings, Study

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
HEAD = "# yaml-language-server: $schema="  # of a file's first line, with where the schema lies


def text() -> str:
    """Return the schema as the text of a file."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def json_schema() -> Schema:
    """Return the schema of study files, with the fields of each method and each source of images."""
    schema = _plain(Study.model_json_schema())
    parts, sections = schema["$defs"], schema["properties"]
    del parts["Settings"], parts["Overrides"]
    for axis, names in _names().items():
        parts[axis] = {"enum": names}
        _name(parts["Grid"]["properties"][f"{axis}s"], axis)
        _name(parts["Filter"]["properties"][axis], axis)
    for kind, section in SECTIONS.items():
        methods = {}
        for name in registry.names(kind):
            parts[f"{section}_{name}"] = _fields(registry.declared(kind, name).settings)
            methods[name] = _settings(f"{section}_{name}", parts)
        sections[section] = _closed(methods, sections[section])
    _let_networks(schema)
    parts["training"] = _fields(Optimization)
    sections["training"] = _settings("training", parts, sections["training"])
    common = parts.pop("Dataset")
    for source in registry.names("datasets"):
        parts[f"source_{source}"] = _dataset(source, common)
    sections["datasets"] |= {
        "propertyNames": {"pattern": "^[A-Za-z0-9_-]+$"},
        "additionalProperties": _by_source(registry.names("datasets")),
    }
    return {"$schema": DIALECT, "title": "Detrojan study file", **schema}


def _names() -> dict[str, list[str]]:
    """Return the names that axes of the grid may have; those of data sets are the file's own."""
    return {
        "architecture": registry.names("models"),
        "attack": [NO_METHOD, *registry.names("attacks")],
        "defense": [NO_METHOD, *registry.names("defenses")],
        "protocol": [*PROTOCOLS, *SEARCHED],
    }


def _let_networks(schema: Schema) -> None:
    """Let a study name networks of others: in their short form, or as entries of ``architectures``.

    Where the section has such entries, an architecture may have any name; else a file's, or a short form.
    """
    parts, section = schema["$defs"], schema["properties"]["architectures"]
    files = parts["architecture"]["enum"]
    parts["network"] = _fields(networks.FIELDS)
    entry = _settings("network", parts) | {"required": [registry.NETWORK]}
    section["patternProperties"] = {f"^(?!({'|'.join(files)})$){networks.NAME}$": entry}
    short = {"type": "string", "pattern": r"^(torchvision:|timm:)[a-z0-9_.]+$|\.py$"}
    parts["architecture"] = {
        "anyOf": [{"enum": files}, short, {"type": "string", "pattern": f"^{networks.NAME}$"}]
    }
    known = {"items": {"anyOf": [{"enum": files}, short]}}
    schema["if"] = {"properties": {"architectures": {"propertyNames": {"enum": files}}}}
    schema["then"] = {"properties": {"grid": {"properties": {"architectures": known}}}}


def _plain(schema: Any) -> Any:
    """Return ``schema`` without titles, which repeat names, and without defaults of null."""
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: part for key, part in schema.items() if key != "title" or not isinstance(part, str)}
    return {key: _plain(part) for key, part in kept.items() if key != "default" or part is not None}


def _name(schema: Schema, axis: str) -> None:
    """Let each text in ``schema`` be a name of this axis."""
    for part in (schema, *schema.get("anyOf", ())):
        if "items" in part:
            _name(part["items"], axis)
        elif part.get("type") == "string" and "const" not in part:
            del part["type"]
            part["$ref"] = f"#/$defs/{axis}"


def _closed(properties: Schema, described: Schema) -> Schema:
    """Return the schema of a mapping with these keys and no others, and with the description of another."""
    about = {"description": described["description"]} if "description" in described else {}
    return about | {"type": "object", "additionalProperties": False, "properties": properties}


def _fields(kind: type[BaseModel]) -> Schema:
    """Return the schema of some settings of this kind; which are missing, only the whole file can tell."""
    schema = _plain(kind.model_json_schema())
    return _closed(schema["properties"], schema)


def _settings(part: str, parts: Schema, described: Schema | None = None) -> Schema:
    """Return the schema of the fields that a part of the schema has, and of overrides of them."""
    path = f"#/$defs/{part}"
    override = _closed({"when": {"$ref": "#/$defs/Filter"}, "set": {"$ref": path}}, {})
    overrides = {
        "description": Settings.model_fields["overrides"].description,
        "type": "array",
        "items": override | {"required": ["when", "set"]},
    }
    own = {name: {"$ref": f"{path}/properties/{name}"} for name in parts[part]["properties"]}
    return _closed({**own, "overrides": overrides}, described or {})


def _dataset(source: str, common: Schema) -> Schema:
    """Return the schema of a data set of this source: the fields that all have, and its own."""
    own = _plain(registry.declared("datasets", source).settings.model_json_schema())
    properties = {**common["properties"], **own["properties"]}
    return _closed(properties, common) | {"required": [*common["required"], *own.get("required", [])]}


def _by_source(sources: list[str]) -> Schema:
    """Return the schema of a data set, which by its source has the fields of one of several parts."""
    choices = [
        {
            "if": {"properties": {"source": {"const": source}}, "required": ["source"]},
            "then": {"$ref": f"#/$defs/source_{source}"},
        }
        for source in sources
    ]
    return {
        "type": "object",
        "required": ["source"],
        "properties": {"source": {"enum": sources}},
        "allOf": choices,
    }
