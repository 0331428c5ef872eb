"""Runs a Python script or module on the fake GPU.

python tests/fake_cuda/run.py SCRIPT [ARGUMENTS]
python tests/fake_cuda/run.py -m MODULE [ARGUMENTS]
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def work_around_limits() -> None:
    """Changes PyTorch where it reads values that the fake GPU never computed, or calls a library that is not replaced.

    Call it in a process of its own making (a worker started with ``spawn``, say); ``run.py`` has called it in this one.
    """
    import torch

    # cuDNN is not replaced: attention takes FlashAttention, convolutions take PyTorch's own kernels.
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)

    # Adam checks `0 <= lr` and reads the answer from the device where lr is a tensor.
    made, truth = torch.optim.Adam.__init__, torch.Tensor.__bool__

    def make(self, *arguments, **options) -> None:
        torch.Tensor.__bool__ = lambda tensor: True if tensor.is_cuda else truth(tensor)
        try:
            made(self, *arguments, **options)
        finally:
            torch.Tensor.__bool__ = truth

    torch.optim.Adam.__init__ = make


def main() -> None:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # tests/ instead of this folder, whose names are short
    from fake_cuda import build

    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        sys.exit(__doc__)
    if "FAKE_CUDA" not in os.environ:  # a library is preloaded when a process starts: start this one again
        command = build.command(*arguments)
        os.execve(command[0], command, build.environment(build.library()))
    work_around_limits()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
