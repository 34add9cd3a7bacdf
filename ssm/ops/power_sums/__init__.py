"""K_j = Re sum_n c_n z_n^j: the kernel of a diagonal system."""

from ssm.ops.power_sums.op import BACKENDS, power_sums

__all__ = ["BACKENDS", "power_sums"]
