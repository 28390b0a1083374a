"""Make the schema that the project ships from the CRDs of a KubeRay release.

    python -m cluster.derive_schema CRDS --version 1.7.0

CRDS is a folder with rayclusters, rayjobs and rayservices as YAML, gzipped or not: `ray-operator/config/crd/bases` of
KubeRay's sources.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cluster.crd_schema import Schema, derive, read_crds
from rexrag.errors import UserError

SHIPPED: Final = Path(__file__).resolve().parent / "kuberay_schema.json"


def schema_text(schema: Schema) -> str:
    """The schema as the file that is shipped: a line for each part, so that a new release reads as a difference."""
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def main(words: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.derive_schema", description="Derive the schema.")
    parser.add_argument("crds", type=Path, help="folder with the CRDs of a KubeRay release")
    parser.add_argument("--version", required=True, help="the release, such as 1.7.0")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="file to write (default: the shipped one)")
    options = parser.parse_args(words)
    try:
        schema = derive(read_crds(options.crds), source=f"KubeRay {options.version}")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    options.out.write_text(schema_text(schema), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
