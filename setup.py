"""The folder kernels/ at the top of the tree installs as the subpackage mae_ast_fast.kernels."""

from setuptools import setup

setup(
    packages=["mae_ast_fast", "mae_ast_fast.commands", "mae_ast_fast.kernels"],
    package_dir={"mae_ast_fast.kernels": "kernels"},
    package_data={"mae_ast_fast": ["assets/*", "assets/tasks/*"]},
)
