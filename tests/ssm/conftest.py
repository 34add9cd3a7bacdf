"""Triton's interpreter, made to prepare its language once a launch."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def _language_patched_once_a_launch() -> None:
    """A launch patches the whole of ``triton.language`` and restores it at its end.

    The interpreter patches it again at each call of one function by another, which
    changes nothing and takes a third of the time; here, only for the first of each
    module.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch: Callable[[Any], Any] = interpreter._patch_lang
    patched: set[int] = set()  # globals of the functions of the launch that is running

    def patch_once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in patched:
            return None  # only a launch uses the scope
        scope = patch(fn)
        if not patched:  # a launch, which restores what it found
            restore = scope.restore

            def restore_and_forget() -> None:
                patched.clear()
                restore()

            scope.restore = restore_and_forget
        patched.add(module)
        return scope

    interpreter._patch_lang = patch_once
