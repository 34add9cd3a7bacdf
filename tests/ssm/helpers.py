"""One tolerance table for every test of ``ssm``, and failures that say where."""

import torch
from torch import Tensor

# Largest error allowed, relative to the largest entry of the reference: 1e-10 for
# float64, 32 units of rounding for float32 and complex64, 4 for the 16-bit formats.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float32: 32 * 2.0**-23,
    torch.complex64: 32 * 2.0**-23,
    torch.bfloat16: 4 * 2.0**-7,
    torch.float16: 4 * 2.0**-10,
}


def error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected| in double precision (0 if empty)."""
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    if actual.numel() == 0:
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    double = torch.promote_types(expected.dtype, torch.float64)
    difference = (actual.to(double) - expected.to(double)).abs()
    scale = float(expected.to(double).abs().max())
    if actual.is_floating_point() or actual.is_complex():
        # numbers that the dtype cannot hold may vanish
        scale = max(scale, torch.finfo(actual.dtype).tiny)
    return float(difference.max()) / scale if scale else float(difference.max())


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    name: str = "",
    dtype: torch.dtype | None = None,
    least: float = 0.0,
) -> None:
    """Assert agreement within the tolerance of ``dtype`` (default: that of actual).

    ``least``: a tolerance that theory allows, where it is wider.
    """
    actual, expected = actual.detach(), expected.detach()
    worst = error(actual, expected)
    allowed = max(TOLERANCE[dtype or actual.dtype], least)
    if not worst <= allowed:  # NaN fails too
        flat = (actual - expected).abs().flatten()
        where = int(flat.nan_to_num(nan=torch.inf).argmax())
        index = tuple(
            int(i) for i in torch.unravel_index(torch.tensor(where), actual.shape)
        )
        raise AssertionError(
            f"{name}: error {worst:.2e} at {index} exceeds {allowed:.1e}: "
            f"{actual[index].item()} against {expected[index].item()}"
        )
