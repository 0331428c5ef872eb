"""The Python blocks of the README's first screen, to be run by tests."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent.parent / "README.md"


def first_screen(device: str = "cpu") -> str:
    """The code under "Ten lines" as one script, with waveforms and model on ``device``."""
    section = README.read_text().partition("## Ten lines\n")[2].partition("\n## ")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section, re.S))
    for line in (
        "waveforms = torch.randn(4, 160_000).clamp(-1, 1)",
        'model = MAEAST(MAEASTConfig.preset("patch_base"))',
    ):
        if code.count(line) != 1:
            raise ValueError(f"expected one line {line!r} in the README's first screen, got {code.count(line)}")
        code = code.replace(line, line if device == "cpu" else f'{line}.to("{device}")')
    return code
