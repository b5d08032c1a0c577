"""Kubernetes' definitions as a validator that says no to what the cluster would silently leave out."""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema
import yaml

from support import shared

FILES = {"TrainJob": "trainer.kubeflow.org_trainjobs.yaml", "JobSet": "jobset.x-k8s.io_jobsets.yaml"}

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"},
        "labels": TEXTS,
        "annotations": TEXTS,
    },
}
"""The server knows what `metadata` holds; the definitions say only that it is an object."""


def mistakes(manifest: dict[str, Any]) -> list[str]:
    """Everything that is wrong with a manifest, as `path: what`."""
    found = _validator(manifest["kind"]).iter_errors(manifest)
    return sorted(f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in found)


@cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    definition = yaml.load(shared("labs", "crds", FILES[kind]).read_text(), Loader=yaml.CSafeLoader)
    (version,) = definition["spec"]["versions"]
    schema = _strict(version["schema"]["openAPIV3Schema"])
    group, name = definition["spec"]["group"], version["name"]
    schema["properties"] |= {"metadata": METADATA, "apiVersion": {"const": f"{group}/{name}"}, "kind": {"const": kind}}
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return jsonschema.Draft202012Validator(schema)


def _strict(schema: Any) -> Any:
    """The schema, which refuses fields that it does not name: a structural schema drops them without a word."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _strict(value) for key, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict) and not open_ended:
        plain["additionalProperties"] = False
    return plain
