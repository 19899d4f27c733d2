"""Makes torch give the same bits for the same inputs, and start no slower than it has to."""

import inspect
import os
import sys


def configure(threads: int) -> None:
    """Make torch deterministic and give it the job's threads, if the script has imported it at all."""
    if "torch" not in sys.modules:
        return
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts, which is later
    # Only a warning where there is no deterministic algorithm: on a GPU, VGG's average pooling to 7×7.
    # The same as use_deterministic_algorithms(True, warn_only=True), which loads torch's compiler besides.
    torch.set_deterministic_debug_mode("warn")
    # Filling all memory that is allocated is a fifth of the operators of a step, and decides nothing as long
    # as nothing reads what was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(threads)
    leave_out_the_compiler()


def leave_out_the_compiler() -> None:
    """Undo that optimizers load torch's compiler, with which nothing here compiles anything.

    It takes as long as torch itself, and a large study starts tens of thousands of jobs.
    """
    import torch

    optimizer = torch.optim.Optimizer
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        setattr(optimizer, name, inspect.unwrap(getattr(optimizer, name)))
    for kind in (torch.optim.SGD, torch.optim.Adam):
        # What else the wrapper does.
        setattr(kind, "step", torch.no_grad()(inspect.unwrap(kind.step)))  # noqa: B010, or mypy minds
