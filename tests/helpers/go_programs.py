"""Go programs of the tests, built once into the user's cache, and again when their source or their modules change.

`python -m tests.helpers.go_programs FOLDER…` builds; tests only look, as a build takes longer than a test may.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perdure" / "bin"


def program(folder: Path) -> Path:
    """Returns the program of the Go package in `folder`.

    Raises:
        FileNotFoundError: It was not built; the target of make that runs the test builds it.
    """
    path = _path(folder)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; python -m tests.helpers.go_programs {folder} builds it")
    return path


def build(folder: Path) -> None:
    """Builds the Go package in `folder`, unless that was done.

    Raises:
        SystemExit: There is no Go, or the build failed; with a sentence or Go's own messages.
    """
    path = _path(folder)
    if path.exists():
        return
    if shutil.which("go") is None:
        sys.exit(f"Go 1.24 or newer is needed to build {folder}, and there is no `go` on the PATH")
    print(f"building {folder} (once)", flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    link = " ".join(["-s", "-w", *_variables(folder)])
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:  # then renamed: what lies there is whole
        made = Path(scratch) / path.name
        command = ["go", "build", "-trimpath", "-buildvcs=false", "-ldflags", link, "-o", made, "."]
        done = subprocess.run(command, cwd=folder, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        made.rename(path)


def _variables(folder: Path) -> list[str]:
    """Returns the linker's flags for variables that are set by a build, which `folder` may hold in a file."""
    path = folder / "ldflags"
    return path.read_text().split() if path.exists() else []


def _path(folder: Path) -> Path:
    folder = folder.resolve()
    module = next(parent for parent in (folder, *folder.parents) if (parent / "go.mod").exists())
    source = [module / "go.mod", module / "go.sum", *sorted(path for path in folder.iterdir() if path.is_file())]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in source)).hexdigest()
    return CACHE / f"{folder.name}-{digest[:12]}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        build(Path(name))
