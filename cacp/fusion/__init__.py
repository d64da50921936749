"""A network at full speed: every batch norm in one operation with the convolution, addition and ReLU around it.

The layers of a pruned CNN are thin, so passes over memory cost as much as the arithmetic. A `FusedNetwork` computes
what its model does, in the precision asked for, with fewer of them:

- evaluation: batch norm is folded into the convolution (Jacob et al., CVPR 2018, section 3.2); on a CPU, oneDNN adds
  the residual and applies ReLU before the result leaves the cache.
- recalibration: on a CPU, the statistics of a batch come from sums over wide rows. PyTorch's batch norm in training
  mode lets the threads share cache lines: below 16 channels, two threads take twice the time of one.

Letters: B images, C channels, H height, W width, N = B * H * W.
"""

from cacp.fusion.network import FusedNetwork, Unfusable
from cacp.fusion.units import Moments

__all__ = ["FusedNetwork", "Moments", "Unfusable"]
