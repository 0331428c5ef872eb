"""``python -m mae_ast_fast`` runs the command ``mae-ast-fast``."""

import sys

from .cli import main

sys.exit(main())
