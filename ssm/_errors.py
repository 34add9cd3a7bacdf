"""Bad arguments answered in one line: what was given, what was expected, the mend."""

from collections.abc import Sequence

import torch

from experiments._inputs import InputError


class ArgumentError(InputError):
    """A wrong argument; its text is one line, all that a command line shows."""


class BackendError(RuntimeError):
    """A backend was asked for that cannot do this here; its text says why."""


def bad_argument(name: str, got: object, expected: str, mend: str) -> ArgumentError:
    """The error for an argument ``name``, worded alike everywhere."""
    return ArgumentError(f"{name}: got {got}; expected {expected}; {mend}")


def check_shape(
    name: str, tensor: torch.Tensor, *allowed: Sequence[int | None]
) -> None:
    """Raise ArgumentError unless the shape is one of ``allowed`` (None: any size)."""
    shape = tuple(tensor.shape)
    for pattern in allowed:
        if len(pattern) == len(shape) and all(
            want is None or want == have
            for want, have in zip(pattern, shape, strict=True)
        ):
            return
    shapes = " or ".join(
        "(" + ", ".join("any" if n is None else str(n) for n in p) + ")"
        for p in allowed
    )
    raise bad_argument(name, f"shape {shape}", f"shape {shapes}", "reshape it")


def check_alike(reference: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise ArgumentError unless every tensor lies on the device of ``reference``."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != reference.device:
            raise bad_argument(
                name,
                f"a tensor on {tensor.device}",
                f"one on {reference.device}, where the input lies",
                f"move it with .to('{reference.device}')",
            )


def check_floating(**tensors: torch.Tensor | None) -> None:
    """Raise ArgumentError unless every tensor is floating point or complex."""
    for name, tensor in tensors.items():
        if tensor is not None and not (
            tensor.is_floating_point() or tensor.is_complex()
        ):
            raise bad_argument(
                name, f"dtype {tensor.dtype}", "a floating-point dtype", "convert it"
            )


def check_finite_values(**tensors: torch.Tensor | None) -> None:
    """Raise ArgumentError if a tensor holds NaN or infinity (reads the values)."""
    for name, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            where = tuple((~torch.isfinite(tensor)).nonzero()[0].tolist())
            raise bad_argument(
                name,
                f"{tensor[where].item()} at index {where}",
                "finite values",
                "look for the step that made it",
            )
