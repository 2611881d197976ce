"""Does the bar count to its total, on standard error?"""

from __future__ import annotations

import pytest

from compile_attn.progress import token_bar


def test_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with token_bar(7) as advance:
        advance(3)
        advance(4)
    shown = capsys.readouterr()
    assert "7/7" in shown.err and shown.out == ""
