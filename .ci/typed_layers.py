"""Every layer in every form, under the run-time type checker.

Annotated shapes are compared with those that come, at the quick lengths: shapes do not
depend on more. Fails as ``python -m ssm.equivalence`` does, whose rows of operators are
left out: nothing below the layers is checked here.
"""

import sys

from jaxtyping import install_import_hook

import tests.helpers  # noqa: F401  # the hook names it

with install_import_hook(["ssm.layers", "ssm.models"], "tests.helpers.typecheck"):
    from ssm.equivalence import QUICK_LENGTHS, jobs, layer_row, show


def main() -> int:
    """Print the rows of the layers; return 1 if a cell is missing or wrong."""
    layers = [job for job in jobs() if job[0] is layer_row]
    rows = [row(*case, QUICK_LENGTHS) for row, *case in layers]
    show(rows)
    return int(not rows or any(row.problems() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
