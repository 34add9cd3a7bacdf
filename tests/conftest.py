"""Shared by every test: real processes are started from the project's root."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from unittest.mock import patch

import hypothesis
import jaxtyping._import_hook
import pytest

import tests.helpers  # noqa: F401  # the type checker of the run is found in it

# Workers share the cores: threads of their own would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    for library in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")


def _get_code(loader: SourceFileLoader, name: str) -> CodeType | None:
    """The code of an instrumented module, kept in a file of jaxtyping's own name.

    jaxtyping gives that name to the files of all that is imported while the module
    runs, so that other packages were compiled again; and not to what ``runpy`` gets,
    which left instrumented code to processes without the type checker.
    """
    named = partial(
        jaxtyping._import_hook._optimized_cache_from_source,
        loader._typechecker.get_hash(),
    )
    with patch("importlib._bootstrap_external.cache_from_source", named):
        return SourceFileLoader.get_code(loader, name)


jaxtyping._import_hook._JaxtypingLoader.get_code = _get_code
jaxtyping._import_hook._JaxtypingLoader.exec_module = SourceFileLoader.exec_module

# Tests have XLA compile many functions and run each a few times: with its optimisations
# compiling takes most of the time of all that uses JAX. Processes that tests start
# inherit this; CI runs the README's commands with XLA's defaults.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
)

# CI draws the same examples every time; a developer's runs keep exploring.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

import torch  # noqa: E402  # reads at its import how many threads it may have

# Without a GPU, Triton's interpreter runs the kernels; it must know before the import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks first: begun last, one would leave the other workers without work."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    """Tests exchange backends; what an operator settled in one is not for the next."""
    from ssm.ops._dispatch import forget

    forget()
    yield
    forget()


@pytest.fixture
def run_module() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python -m MODULE ARGUMENTS…`` from the root as a user would."""

    def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )

    return run
