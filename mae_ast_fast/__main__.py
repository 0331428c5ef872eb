"""``python -m mae_ast_fast`` is ``mae-ast-fast``."""

import sys

from .cli import main

sys.exit(main())
