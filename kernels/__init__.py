"""Triton kernels of mae_ast_fast, one file an op; installed as ``mae_ast_fast.kernels``.

Each file holds the kernels, the functions that launch them, their registration with PyTorch and ``examples`` of every
variant for the ahead-of-time report. launch.py launches, table.py says with what, dropout.py draws masks, allowed.py
lists what the report tolerates. Nothing here is imported before it runs; imports inside this folder are relative.
"""
