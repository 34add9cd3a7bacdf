"""Kernels as PyTorch operators, through the low-level interface of torch.library.

``torch.library.custom_op`` offers the same, but its first call imports torch's
compiler: five seconds and more in every new process. An operator registered here is
opaque to ``torch.compile`` in the same way (one node of the graph, its output shapes
from the fake kernel) and costs milliseconds.

PyTorch's dispatcher comes back to Python once for autograd and once for the kernel, at
some ten microseconds each: a fifth of a small scan on a GPU. So a call on ordinary
tensors, which nothing watches, goes to the kernel directly.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

_LIBRARY = torch.library.Library("ssm", "FRAGMENT")


class Operator:
    """``torch.ops.ssm.<name>``, made by :func:`operator`; call it like the function."""

    def __init__(self, name: str, kernel: Callable[..., Any], device: str) -> None:
        self.name = f"ssm::{name}"
        self._kernel = kernel
        self._direct: type[torch.autograd.Function] | None = None
        schema = torch.library.infer_schema(kernel, mutates_args=())
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, kernel, device)
        self.overload = getattr(torch.ops.ssm, name).default

    def __call__(self, *arguments: Any) -> Any:
        if not is_ordinary(arguments[0]):
            return self.overload(*arguments)
        if self._direct is not None and wants_gradient(arguments):
            return self._direct.apply(*arguments)
        return self._kernel(*arguments)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Use as a decorator: the shapes and dtypes of the outputs, without values."""
        torch.library.register_fake(self.name, fake, lib=_LIBRARY)
        return fake

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]
    ) -> None:
        """The backward pass, and what it keeps from the forward pass.

        The hooks are those of ``torch.library.register_autograd``, whose own wrapper
        looks every argument up in the schema at each call: a tenth of a millisecond,
        a fifth of a small scan.
        """
        below = partial(_below_autograd, self.overload)
        dispatched = _differentiable(below, backward, setup_context)
        self._direct = _differentiable(self._kernel, backward, setup_context)

        def entry(*arguments: Any) -> Any:
            if wants_gradient(arguments):
                return dispatched.apply(*arguments)
            return below(*arguments)

        _LIBRARY.impl(self.overload, entry, "Autograd")

    def refuse_backward(self, op: str, backend: str = "cpu") -> None:
        """Let differentiating this, the backward pass of ``op``, say what to do."""

        def refuse(ctx: Any, *grads: Any) -> None:  # noqa: ARG001  # torch's hook
            raise RuntimeError(
                f"{op}: backend {backend!r} is differentiable once; for gradients of "
                "gradients use backend='naive'"
            )

        self.register_autograd(refuse, setup_context=_keep_nothing)


def _differentiable(
    run: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., Any],
) -> type[torch.autograd.Function]:
    """``run`` with this backward pass."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = run(*arguments)
            setup_context(ctx, arguments, output)
            # autograd looks for tensors in tuples only
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    return Differentiable


def wants_gradient(arguments: Sequence[Any]) -> bool:
    """Whether autograd has to record what is made of these."""
    if torch.is_grad_enabled():
        for x in arguments:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                return True
    return False


def is_ordinary(x: torch.Tensor) -> bool:
    """Whether x holds numbers, and no compiler, mode or transform must see its use."""
    return (
        not _is_compiling()
        and type(x) in _ORDINARY
        and not x.is_meta
        and _modes() == 0
        and _transforms() is None
    )


# By name here: looked up at every call they would take longer than they run.
_is_compiling = torch.compiler.is_compiling
_ORDINARY = (torch.Tensor, torch.nn.Parameter)
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack


def _below_autograd(overload: Any, *arguments: Any) -> Any:
    """The operator with autograd out of the way, as ``torch.library`` calls it."""
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*arguments)


def _keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """For a backward pass that only refuses."""


def operator(
    name: str, *, device: str = "CPU"
) -> Callable[[Callable[..., Any]], Operator]:
    """Register the decorated kernel, which must not change its arguments.

    Its annotations give the operator's schema. ``device`` is a dispatch key: "CPU",
    "CUDA", or "CompositeExplicitAutograd" for a kernel that serves every device.
    """
    return lambda kernel: Operator(name, kernel, device)
