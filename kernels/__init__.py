"""Triton kernels of mae_ast_fast, one file per operation; installed as ``mae_ast_fast.kernels``.

Each file contains the kernels, the functions that launch them, their registration with PyTorch, and ``examples`` of
every variant for the ahead-of-time report. common/triton_op.py makes custom ops with autograd, common/launch.py
launches kernels, common/configs.py is the table of launch configurations with the files of configs/, and
common/dropout.py draws dropout masks. spill_allowlist.py lists the
register spills that the report accepts. The package imports a kernel file when it first needs it. Imports inside this
folder are relative.
"""
