"""Are drafts what followed before, and is no more of them kept than came out?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compile_attn.drafting import PromptLookup, accepted


@pytest.mark.parametrize(
    ("tokens", "most", "drafts"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], 4, [4, 9, 1, 2]),
        ([1, 2, 3, 4, 9, 1, 2, 3], 1, [4]),
        ([7, 7, 7], 4, [7]),  # one token was seen to follow
        ([5, 1, 6, 1], 3, [6, 1]),  # no two tokens occur twice
        ([2, 3, 8, 1, 2, 3, 5, 0, 3, 1, 2, 3], 2, [5, 0]),  # three before two, the last time before the first
        ([1, 2, 3], 3, []),
        ([1], 3, []),
        ([256, 1, 2, 0, 256], 2, [1, 2]),  # 0, 256 holds the bytes of 1 where no token begins
    ],
)
def test_what_followed_before(tokens: list[int], most: int, drafts: list[int]) -> None:
    assert PromptLookup(3).propose(tokens, most) == drafts


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 4))
def test_any_tokens(tokens: list[int], most: int, ngram: int) -> None:
    expected: list[int] = []
    for count in range(min(ngram, len(tokens) - 1), 0, -1):
        begins = [at for at in range(len(tokens) - count) if tokens[at : at + count] == tokens[-count:]]
        if begins:
            expected = tokens[begins[-1] + count :][:most]
            break
    assert PromptLookup(ngram).propose(tokens, most) == expected


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="ngram=0"):
        PromptLookup(0)
    with pytest.raises(ValueError, match="least=3 tokens of ngram=2"):
        PromptLookup(2, least=3)


@pytest.mark.parametrize(
    ("drafts", "sampled", "kept"),
    [([], [4], 0), ([4], [4, 5], 1), ([4], [3, 5], 0), ([4, 5, 6], [4, 9, 6, 1], 1), ([4, 5, 6], [4, 5, 6, 1], 3)],
)
def test_drafts_are_kept_up_to_the_first_wrong_one(drafts: list[int], sampled: list[int], kept: int) -> None:
    assert accepted(drafts, sampled) == kept
