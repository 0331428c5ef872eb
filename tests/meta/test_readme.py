"""The README's first screen: its code runs, and it stays short and plain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from readme_code import README, first_screen


@pytest.mark.ci
def test_first_screen_code_matches_its_comments() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(first_screen(), str(README), "exec"), names)
    assert names["hidden"].last_hidden_state.shape == (4, 504, 768)
    assert names["hidden"].lengths.tolist() == [504, 152, 312, 104]
    assert all(metric.isfinite() for metric in names["metrics"])


def test_first_screen_has_two_commands_and_no_image() -> None:
    lines = README.read_text().splitlines()[:45]
    text = "\n".join(lines)
    assert "make pretrain" in text and "make test" in text and "```python" in text
    assert text.index("make pretrain") < text.index(". .venv/bin/activate") < text.index("```python")
    assert not [line for line in lines if line.startswith("![")]
