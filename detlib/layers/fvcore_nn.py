"""The parts of `fvcore.nn` that detlib uses: initialization, losses and precise batch norm.

Importing `fvcore.nn` compiles a function with `torch.jit`, which emits a deprecation warning. All of detlib
imports it from this module, which hides the warning, since users cannot do anything about it.
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
    from fvcore.nn import giou_loss, smooth_l1_loss, weight_init
    from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats

__all__ = ["get_bn_modules", "giou_loss", "smooth_l1_loss", "update_bn_stats", "weight_init"]
