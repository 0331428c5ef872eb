"""The commands of ``mae-ast-fast``: each a function from its arguments to an exit code."""
