"""The project's only import of torchvision, which also works where its compiled operators can't load.

The wheel in the package registries is linked against CUDA. Beside a CPU build of torch its shared
library doesn't load, and the import then fails, because torchvision describes to torch two operators
that this library should have defined. None of our networks or data sets uses a compiled operator, so
such a machine gets their names alone: calling one is an error, and all else works. A plain
``import torchvision`` elsewhere may come too early: import it from here.
"""

import torch

__all__ = ["torchvision"]

# Those for which torchvision 0.28 registers a shape function whether or not its library is loaded.
_DESCRIBED = ("nms", "qnms")

try:
    import torchvision
except RuntimeError as error:
    if "operator torchvision::" not in str(error):
        raise
    # Only after the plain import has failed: where the library loads, these names are its own. All
    # at once: a failed import leaves the shape functions that it got to, and a further try clashes.
    for _operator in _DESCRIBED:
        if not hasattr(torch.ops.torchvision, _operator):
            torch.library.define(
                f"torchvision::{_operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    import torchvision
