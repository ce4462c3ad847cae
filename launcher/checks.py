"""The checks of `run.py test` and of pre-commit that need more than a command.

python -m launcher.checks types      mypy on aclora_core and nodes
python -m launcher.checks imports    import-linter: rooms import downwards
"""

from __future__ import annotations

import subprocess
import sys

from launcher.environment import ROOT, RUNTIME
from launcher.host import link_pack

CACHE = RUNTIME / "import_linter_cache"


def types() -> int:
    """Check the types with mypy and return its exit code.

    In ComfyUI the checkout is a package, from which nodes import `...aclora_core`. mypy has to see it as one too, and
    under a name that Python allows, so it reads the checkout through a link in .runtime/types.
    """
    link_pack(RUNTIME / "types")
    return subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT).returncode


def imports() -> int:
    """Check the contracts of pyproject.toml with import-linter and return its exit code."""
    code = f"from importlinter.cli import lint_imports_command as check; check(['--cache-dir', {str(CACHE)!r}])"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode


CHECKS = {"types": types, "imports": imports}


def main(words: list[str]) -> int:
    """Run the named check and return its exit code."""
    if len(words) != 1 or words[0] not in CHECKS:
        print(__doc__)
        return 2
    return CHECKS[words[0]]()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
