"""The selective scan of Mamba (S6): see :func:`selective_scan`."""

from ssm.ops.selective_scan.fn import selective_scan_fn
from ssm.ops.selective_scan.op import BACKENDS, selective_scan
from ssm.ops.selective_scan.update import selective_state_update

__all__ = [
    "BACKENDS",
    "selective_scan",
    "selective_scan_fn",
    "selective_state_update",
]
