"""Kernels as PyTorch operators, through the low-level interface of torch.library.

``torch.library.custom_op`` offers the same, but its first call imports torch's
compiler: five seconds and more in every new process. An operator registered here is
opaque to ``torch.compile`` in the same way (one node of the graph, its output shapes
from the fake kernel) and costs milliseconds.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("ssm", "FRAGMENT")


class Operator:
    """``torch.ops.ssm.<name>``, made by :func:`operator`; call it like the function."""

    def __init__(self, name: str, kernel: Callable[..., Any], device: str) -> None:
        self.name = f"ssm::{name}"
        schema = torch.library.infer_schema(kernel, mutates_args=())
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, kernel, device)
        self.overload = getattr(torch.ops.ssm, name).default

    def __call__(self, *arguments: Any) -> Any:
        return self.overload(*arguments)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Use as a decorator: the shapes and dtypes of the outputs, without values."""
        torch.library.register_fake(self.name, fake, lib=_LIBRARY)
        return fake

    def register_autograd(
        self,
        backward: Callable[..., Any],
        *,
        setup_context: Callable[..., Any] | None = None,
    ) -> None:
        """The backward pass, and what it keeps from the forward pass."""
        torch.library.register_autograd(
            self.name, backward, setup_context=setup_context, lib=_LIBRARY
        )

    def refuse_backward(self, op: str) -> None:
        """Let differentiating this, the backward pass of ``op``, say what to do."""

        def refuse(ctx: Any, *grads: Any) -> None:  # noqa: ARG001  # torch's hook
            raise RuntimeError(
                f"{op}: backend 'cpu' is differentiable once; for gradients of "
                "gradients use backend='naive'"
            )

        self.register_autograd(refuse)


def operator(
    name: str, *, device: str = "CPU"
) -> Callable[[Callable[..., Any]], Operator]:
    """Register the decorated kernel, which must not change its arguments.

    Its annotations give the operator's schema. ``device`` is a dispatch key: "CPU",
    "CUDA", or "CompositeExplicitAutograd" for a kernel that serves every device.
    """
    return lambda kernel: Operator(name, kernel, device)
