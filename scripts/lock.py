"""Write requirements.lock (all extras) and deploy/requirements.lock (what the service needs): nearly every library,
transitively, with the hashes that PyPI publishes.

    make lock                    # or: python scripts/lock.py, with pip-tools importable

torch is left out on purpose, and so are accelerate and peft, which would bring it in. One version of it exists as
different files: PyPI's wheel brings CUDA, the index download.pytorch.org/whl/cpu and the wheel folders of some machines
hold a CPU one, so that no single list of hashes fits. They are pinned by version in pyproject.toml and installed behind
the lock (Makefile); what they need of plain Python is locked here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
SERVICE_LOCK = ROOT / "deploy" / "requirements.lock"
APART = ("accelerate==", "peft==", "torch==")
TORCH_NEEDS = ("filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing-extensions")
HEADER = """\
# Made by `make lock` (scripts/lock.py) with Python {python}. Do not edit.
# Everything but torch, accelerate and peft, which are pinned in pyproject.toml: docs/dependencies.md says why.
#
"""


def requirements(*extras: str) -> list[str]:
    """Return what pyproject.toml asks for, with `extras`; what is APART is replaced by what it needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return sorted([line for line in wanted if not line.startswith(APART)] + list(TORCH_NEEDS), key=str.lower)


def resolve(wanted: list[str], known: Path | None) -> str:
    """Return `wanted` and all that it needs, pinned with hashes; what `known` pins stays as it is.

    PyPI alone is asked, so that the hashes hold on every machine.
    """
    environment = {
        name: value for name, value in os.environ.items() if name not in {"PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"}
    }
    environment |= {"PIP_CONFIG_FILE": os.devnull, "CUSTOM_COMPILE_COMMAND": "make lock"}
    with tempfile.TemporaryDirectory() as folder:
        source, compiled = Path(folder, "requirements.in"), Path(folder, "requirements.txt")
        source.write_text("\n".join(wanted) + "\n")
        command = [sys.executable, "-m", "piptools", "compile", "--generate-hashes", "--allow-unsafe", "--strip-extras"]
        command += ["--no-header", "--no-annotate", "--no-emit-options", "--quiet"]
        command += ["--resolver=backtracking", f"--output-file={compiled}", str(source)]
        if known is not None:
            compiled.write_text(known.read_text())
        subprocess.run(command, env=environment, check=True)
        return "\n".join(line for line in compiled.read_text().splitlines() if not line.startswith("#"))


def main() -> None:
    """Write both lock files; the smaller one has the versions of the other."""
    known = LOCK if LOCK.exists() and "--upgrade" not in sys.argv else None
    for lock, wanted in ((LOCK, requirements("bench", "dev")), (SERVICE_LOCK, requirements())):
        body = resolve(wanted, known)
        lock.write_text(
            HEADER.format(python=f"{sys.version_info.major}.{sys.version_info.minor}") + body.strip() + "\n"
        )
        print(f"wrote {lock.relative_to(ROOT)}: {body.count('==')} packages")
        known = LOCK


if __name__ == "__main__":
    main()
