"""Triton kernels of mae_ast_fast, one file an op; installed as ``mae_ast_fast.kernels``.

No kernel is written yet: ``impl="triton"`` raises a ``ValueError`` until the first one lands, and ``impl="auto"``
uses the plain PyTorch path everywhere. Imports inside this folder are relative.
"""
