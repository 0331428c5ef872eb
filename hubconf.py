"""Entries of torch.hub: ``torch.hub.load(CHECKOUT, "mae_ast_fast", source="local", ckpt=DIR)`` is an s3prl upstream."""

from mae_ast_fast.s3prl import mae_ast_fast, mae_ast_fast_local  # noqa: F401

dependencies = ["torch", "numpy", "safetensors", "huggingface_hub"]
