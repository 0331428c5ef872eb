"""Triton kernels of mae_ast_fast, one file an op; installed as ``mae_ast_fast.kernels``.

Each file holds the kernels, the functions that launch them, their registration with PyTorch and ``examples`` of every
variant for the ahead-of-time report. common/launch.py launches, common/configs.py says with what, common/dropout.py
draws masks, spill_allowlist.py lists what the report tolerates. Nothing here is imported before it runs; imports inside
this folder are relative.
"""
