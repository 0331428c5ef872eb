"""Run a Python script or module on the fake GPU.

python tests/fake_cuda/run.py SCRIPT [ARGUMENTS]
python tests/fake_cuda/run.py -m MODULE [ARGUMENTS]
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def work_around_limits() -> None:
    """Change the parts of PyTorch that read values which the fake GPU never computed, or call an unsupported library.

    ``run.py`` calls it. Other processes, for example workers started with ``spawn``, must call it themselves.
    """
    import torch

    # cuDNN is not replaced: attention uses FlashAttention, convolutions use PyTorch's kernels.
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)

    # Adam checks `0 <= lr`, and reads the answer from the device if lr is a tensor.
    adam_init, tensor_bool = torch.optim.Adam.__init__, torch.Tensor.__bool__

    def patched_init(self, *arguments, **options) -> None:
        torch.Tensor.__bool__ = lambda tensor: True if tensor.is_cuda else tensor_bool(tensor)
        try:
            adam_init(self, *arguments, **options)
        finally:
            torch.Tensor.__bool__ = tensor_bool

    torch.optim.Adam.__init__ = patched_init


def main() -> None:
    sys.path[0] = str(
        Path(__file__).resolve().parent.parent
    )  # tests/ instead of this folder, whose module names are ambiguous
    from fake_cuda import build

    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        sys.exit(__doc__)
    if "FAKE_CUDA" not in os.environ:  # a library can only be preloaded at the start of a process: restart this one
        command = build.script_command(*arguments)
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
