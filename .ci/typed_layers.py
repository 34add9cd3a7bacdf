"""Every operator and layer in every form, under the run-time type checker.

Annotated shapes are compared with those that come, at the quick lengths: shapes do not
depend on more. Fails as ``python -m ssm.equivalence`` does.
"""

import sys

from jaxtyping import install_import_hook

import tests.helpers  # noqa: F401  # the hook names it

with install_import_hook(["ssm.layers", "ssm.models"], "tests.helpers.typecheck"):
    from ssm.equivalence import main

if __name__ == "__main__":
    sys.exit(main(["--quick"]))
