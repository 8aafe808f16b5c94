"""Lays the package out for Hugging Face's kernels: `python .github/hub.py FOLDER LICENSE`.

FOLDER receives what `kernels upload` takes (build/torch-cuda and build/torch-cpu: Python alone, so
that nothing is compiled) and what kernel-builder builds it from (build.toml, torch-ext/tridil).
LICENSE is the SPDX name of the one it is published under. `kernels.get_local_kernel(FOLDER)` loads
it; published it is `get_kernel("OWNER/tridil")`.
Format: https://huggingface.co/docs/kernels/builder/writing-kernels
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("cuda", "cpu")  # on the CPU: ATen
KINDS = ("py", "csv", "json", "typed")
VERSION = 1  # of the interface, as the hub counts


def main(folder: Path, license: str) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: name a new folder")
    sources = sorted(
        path
        for path in (ROOT / "tridil").rglob("*")
        if path.suffix[1:] in KINDS and "__pycache__" not in path.parts
    )
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    for to in ("torch-ext/tridil", *(f"build/torch-{backend}" for backend in BACKENDS)):
        for path in sources:
            copy = folder / to / path.relative_to(ROOT / "tridil")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    for backend in BACKENDS:
        about = {
            "id": f"_tridil_{backend}_{digest}",
            "name": "tridil",
            "version": VERSION,
            "license": license,
            "python-depends": [],
            "backend": {"type": backend},
        }
        Path(folder, "build", f"torch-{backend}", "metadata.json").write_text(
            json.dumps(about, indent=2) + "\n", encoding="utf-8"
        )
    kinds, backends = (json.dumps(list(names)) for names in (KINDS, BACKENDS))
    (folder / "build.toml").write_text(
        f'[general]\nname = "tridil"\nversion = {VERSION}\nedition = 5\nlicense = {json.dumps(license)}\nbackends = {backends}\n\n'
        f"[torch-noarch]\npyext = {kinds}\n",
        encoding="utf-8",
    )
    shutil.copy(ROOT / "README.md", folder / "README.md")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2])
