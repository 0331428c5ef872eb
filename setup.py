"""The folder kernels/ at the top of the tree installs as the subpackage mae_ast_fast.kernels."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mae_ast_fast*"]), "mae_ast_fast.kernels", "mae_ast_fast.kernels.common"],
    package_dir={"mae_ast_fast.kernels": "kernels"},
    package_data={
        "mae_ast_fast": ["py.typed"],
        "mae_ast_fast.data": ["assets/*", "assets/tasks/*"],
        "mae_ast_fast.kernels": ["configs/*"],
        "mae_ast_fast.training": ["yardstick.json"],
    },
)
