"""Is a known prefix found, and nothing else; and what does a sequence that begins with one hold, write and give back?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compile_attn.cache import CachedSequence, Chunk, OutOfPages, PagedKVCache, StalePrefix
from compile_attn.pages import PageAllocator
from compile_attn.prefixes import PrefixIndex
from tests.tiny import layer_kv


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def cache_of(**changes: object) -> PagedKVCache:
    return PagedKVCache(**{"kv_tokens": 64, "page_size": 4, "max_seqs": 4, **changes})  # type: ignore[arg-type]


def run(cache: PagedKVCache, *chunks: Chunk) -> list[list[int]]:
    """One step without a model: the positions of each chunk's tokens."""
    batch = cache.batch(chunks)
    cache.step_inputs()
    positions = batch.position_ids[0].tolist()
    sizes = [len(chunk.tokens) for chunk in chunks]
    return [positions[sum(sizes[:at]) : sum(sizes[: at + 1])] for at in range(len(sizes))]


def known(cache: PagedKVCache, tokens: list[int], salt: str | None = None) -> tuple[int, ...]:
    """Run these tokens, keep them, free the sequence: its pages."""
    seq = cache.add(salt=salt)
    run(cache, Chunk(seq, tokens))
    cache.keep(seq, tokens)
    pages = seq.pages
    cache.free(seq)
    return pages


def table(cache: PagedKVCache) -> list[list[int]]:
    assert cache.current is not None
    return [[page for page in row if page] for row in cache.buffers.views(cache.current)[0].tolist()]


# The index


def test_the_longest_prefix_is_found() -> None:
    index = PrefixIndex(2)
    assert index.put(ids(1, 2, 3, 4, 5), None, [7, 8])[0] == [7, 8] and len(index) == 2
    assert index.put(ids(1, 2, 9, 9), None, [5, 6])[0] == [6], "of two pages for one prefix the first one stays"
    assert index.match(ids(1, 2, 3, 4, 5, 6)) == [7, 8]
    assert index.match(ids(1, 2, 3)) == [7] and index.match(ids(1, 2, 9, 9)) == [7, 6]
    assert index.match(ids(1)) == index.match(ids(3, 4)) == index.match(ids(2, 1, 3, 4)) == []
    assert 7 in index and 5 not in index


def test_token_ids_of_any_size_are_told_apart() -> None:
    index = PrefixIndex(2)
    index.put(ids(1, 0), None, [1])
    index.put(ids(0, 1), None, [2])
    index.put(ids(1 << 32, 0), None, [3])
    assert [index.match(ids(*pair)) for pair in ((1, 0), (0, 1), (1 << 32, 0), (0, 1 << 32))] == [[1], [2], [3], []]


def test_no_salt_meets_another() -> None:
    index, tokens = PrefixIndex(1), ids(1, 2)
    salts = [None, "", "a", b"a", b"", "1"]
    for at, salt in enumerate(salts):
        assert index.match(tokens, salt) == []
        index.put(tokens, salt, [2 * at + 1, 2 * at + 2])
    for at, salt in enumerate(salts):
        assert index.match(tokens, salt) == [2 * at + 1, 2 * at + 2]


def test_what_follows_a_forgotten_page_is_forgotten() -> None:
    """It could not be found without that page, and would be kept for nobody."""
    index = PrefixIndex(1)
    index.put(ids(1, 2, 3), "a", [1, 2, 3])
    index.put(ids(1, 2, 4), "a", [1, 2, 4])
    index.put(ids(1, 5), "a", [1, 5])
    assert sorted(index.forget(2)) == [2, 3, 4] and index.match(ids(1, 2, 3), "a") == [1] and index.match(ids(1, 5), "a") == [1, 5]
    index.put(ids(1, 2), "a", [1, 8])
    assert index.match(ids(1, 2, 3), "a") == [1, 8]
    assert sorted(index.forget(1)) == [1, 5, 8] and len(index) == 0 and not index._roots, "a salt leaves nothing behind"
    index.put(ids(1), None, [3])
    assert index.clear() == [3] and index.match(ids(1)) == []


def test_a_page_is_known_by_one_prefix() -> None:
    index = PrefixIndex(1)
    index.put(ids(1, 2), None, [1, 2])
    for tokens, salt, pages in (
        (ids(3), None, [1]),
        (ids(1, 3), None, [1, 2]),
        (ids(1), "a", [1]),
        (ids(1, 2, 3), None, [1, 2, 2]),
    ):
        with pytest.raises(ValueError, match=r"page [12] is known to hold other tokens than those given for it"):
            index.put(tokens, salt, pages)
    assert index.match(ids(1, 2, 3)) == [1, 2] and len(index) == 2 and list(index._roots) == [None]


# Owners of pages


def test_300_owners_of_one_page() -> None:
    pages = PageAllocator(2)
    [page] = pages.take(1)
    for _ in range(299):
        pages.share(page)
    assert pages.references(page) == 300 and pages.free_pages == 1
    for _ in range(299):
        assert pages.give_back([page]) == []
    assert pages.give_back([page]) == [page] and pages.free_pages == 2
    with pytest.raises(AssertionError, match="given back twice"):
        pages.give_back([page])


def test_the_page_given_back_first_is_evicted_first() -> None:
    evicted: list[int] = []
    pages = PageAllocator(4, lambda page: evicted.append(page) or pages.lose(page))  # type: ignore[func-returns-value]
    a, b, c, d = pages.take(4)
    for page in (a, b, c):
        pages.keep(page)
    assert pages.give_back([b, a, d, c]) == [d] and pages.free_pages == 4
    pages.share(b)  # somebody used it again
    pages.give_back([b])
    assert pages.take(1) == [d] and not evicted, "a page that holds nothing is taken before one that does"
    assert {*pages.take(2)} == {a, c} and evicted == [a, c]
    with pytest.raises(OutOfPages, match="2 pages are needed, 1 of 4 are free"):
        pages.take(2)
    assert evicted == [a, c]
    assert pages.lose(b) and pages.take(1) == [b] and evicted == [a, c], "what is lost need not be evicted"


# A cache that knows prefixes


def test_the_three_prefix_hits() -> None:
    """P tokens known, ctx computed, L in the prompt: which are run."""
    prompt = list(range(100, 140))
    cache = cache_of(kv_tokens=256, page_size=16)
    [page] = known(cache, prompt[:16])
    seq = cache.add(prompt)
    run(cache, Chunk(seq, prompt[16:32]))
    assert run(cache, Chunk(seq, prompt[32:])) == [list(range(32, 40))], "P <= ctx: L 40, ctx 32, P 16"
    seq = cache.add(prompt[:20])
    assert seq.length == 16 and run(cache, Chunk(seq, prompt[16:20])) == [[16, 17, 18, 19]], "ctx < P < L: L 20, P 16"
    known(cache, prompt[:32])
    seq = cache.add(prompt[:32])
    held = seq.pages
    assert seq.length == 31 and run(cache, Chunk(seq, prompt[31:32])) == [[31]], "L <= P: L 32, P 32"
    assert held[0] == seq.pages[0] == page and held[1] != seq.pages[1], "the known page is never written again"
    assert cache.add(prompt[:32]).pages == held
    assert (cache.prefix_hits, cache.prefix_tokens) == (4, 16 + 16 + 31 + 31)


def test_the_table_row_of_a_hit_has_its_new_blocks() -> None:
    cache = cache_of()
    [first] = known(cache, [1, 2, 3, 4])
    seq = cache.add([1, 2, 3, 4, 5, 6])
    run(cache, Chunk(seq, [5, 6]), Chunk(cache.add(), [9]))
    assert table(cache)[0] == [first, seq.pages[1]] == [*seq.pages] and len(seq.pages) == 2
    run(cache, Chunk(seq, [7, 8, 9]))
    assert table(cache)[0] == [*seq.pages] and len(seq.pages) == 3


def test_what_an_admitted_prompt_takes() -> None:
    """Hits that others hold cost nothing, those that could be evicted do, and so does the copy of a last page that others hold."""
    cache = cache_of()
    prompt = list(range(12))
    holder = cache.add()
    run(cache, Chunk(holder, prompt))
    assert cache.find(prompt).pages_to_admit == 3
    cache.keep(holder, prompt)
    for tokens, wanted in (
        (prompt, 1),
        (prompt[:8], 1),
        ([*prompt, 12], 1),
        ([*prompt[:4], 99, 98], 1),
        ([99], 1),
        ([*prompt, *prompt], 3),
    ):
        assert cache.find(tokens).pages_to_admit == wanted, tokens
        taken(cache, tokens, wanted)
    cache.free(holder)
    assert cache.pages_in_use == 0
    for tokens, wanted in ((prompt, 3), ([*prompt, 12], 4), (prompt[:5], 2), ([99], 1)):
        assert cache.find(tokens).pages_to_admit == wanted, tokens
        taken(cache, tokens, wanted)


def taken(cache: PagedKVCache, tokens: list[int], wanted: int) -> None:
    before = cache.free_pages
    seq = cache.add(tokens)
    held = before - cache.free_pages
    assert held + cache.pages_wanted(seq, len(tokens) - seq.length) == wanted
    run(cache, Chunk(seq, tokens[seq.length :]))
    assert before - cache.free_pages == wanted
    cache.free(seq)
    assert cache.free_pages == before


def test_a_prompt_that_fills_the_cache_is_admitted_again() -> None:
    """No page is left for a copy of the last one, so that one is written again, and known no more until it has been."""
    cache = cache_of(kv_tokens=16)
    prompt = list(range(16))
    pages = known(cache, prompt)
    assert cache.find(prompt).pages_to_admit == 4 == cache.free_pages
    seq = cache.add(prompt)
    assert cache.free_pages == cache.pages_wanted(seq, 1) == 0
    run(cache, Chunk(seq, prompt[15:]))
    assert seq.pages == pages and cache.add(prompt).length == 12
    cache.keep(seq, prompt)
    assert cache.add(prompt).length == 15


def test_two_tenants_never_meet() -> None:
    """No hit, no shared page, and the same counts whatever the other has kept: only who is evicted shows."""
    prompt = list(range(10))
    seen = []
    for other_kept in (False, True):
        cache = cache_of(kv_tokens=32)
        first = cache.add(salt="a")
        run(cache, Chunk(first, prompt))
        if other_kept:
            cache.keep(first, prompt)
        cache.free(first)
        counts = [cache.free_pages, cache.find(prompt, salt="b").pages_to_admit]
        seq = cache.add(prompt, salt="b")
        counts += [seq.length, cache.pages_wanted(seq, 10), cache.free_pages]
        run(cache, Chunk(seq, prompt))
        cache.keep(seq, prompt)
        counts += [
            cache.free_pages,
            cache.find(prompt, salt="b").pages_to_admit,
            cache.add(prompt, salt="b").length,
            cache.prefix_hits,
        ]
        seen.append(counts)
    assert seen[0] == seen[1] == [8, 3, 0, 3, 8, 5, 1, 8, 1]
    assert cache.add(prompt).length == 0 and cache.add(prompt, salt=b"b").length == 0
    with pytest.raises(ValueError, match=r"salt=7; a cache salt is a str, bytes or None"):
        cache.add(prompt, salt=7)  # type: ignore[arg-type]


def test_the_end_of_what_was_used_least_recently_is_evicted_first() -> None:
    cache = cache_of(kv_tokens=32)
    old, new = [1] * 8, [2] * 8
    known(cache, old)
    known(cache, new)
    lengths = lambda: [cache._seqs._known([*tokens, 9], None)[1] for tokens in (old, new)]  # noqa: E731
    assert lengths() == [8, 8]
    filler = cache.add()
    run(cache, Chunk(filler, [3] * 20))
    assert lengths() == [4, 8], "its first page still serves"
    cache.free(cache.add([*old[:4], 9]))  # used again
    run(cache, Chunk(filler, [3] * 8))
    assert lengths() == [4, 0]
    run(cache, Chunk(filler, [3] * 4))
    assert lengths() == [0, 0] and cache.free_pages == 0


def test_a_kept_page_is_poisoned_when_it_is_evicted() -> None:
    cache = cache_of(kv_tokens=16, poison=True)
    cache.bind([layer_kv()], owner=0)
    seq = cache.add()
    run(cache, Chunk(seq, [1] * 9))
    cache.k_pages[0].zero_()
    cache.keep(seq, [1] * 9)
    pages = seq.pages
    cache.free(seq)
    assert [bool(cache.k_pages[0][page].isnan().any()) for page in pages] == [False, False, True], "its last page was not full"
    run(cache, Chunk(cache.add(), [2] * 9))
    assert cache.k_pages[0][pages[1]].isnan().all() and not cache.k_pages[0][pages[0]].isnan().any()
    cache.forget_prefixes()
    assert cache.k_pages[0][pages[0]].isnan().all() and cache.add([1] * 9).length == 0


def test_only_full_pages_whose_tokens_are_given_are_known() -> None:
    cache, tokens = cache_of(), list(range(11))
    seq = cache.add()
    run(cache, Chunk(seq, tokens[:10]))
    cache.keep(seq, tokens[:7])
    assert cache.add(tokens).length == 4
    cache.keep(seq, [*tokens, 11])  # more than it holds: the newest one is not in the cache yet
    assert cache.add([*tokens, 11, 12]).length == 8
    with pytest.raises(ValueError, match="known to hold other tokens"):
        cache.keep(seq, [5] * 10)


def test_tokens_are_told_page_by_page() -> None:
    """Each page once: what is known is not told again, unless it was forgotten."""
    cache, tokens = cache_of(kv_tokens=32), list(range(40))
    seq, twin = cache.add(), cache.add()
    for one in (seq, twin):
        run(cache, Chunk(one, tokens[:9]))
    cache.keep(seq, tokens[:5])
    assert cache.kept(seq) == 4
    with pytest.raises(ValueError, match=r"start=8; 4 tokens of .* are known: give those after them, or all"):
        cache.keep(seq, tokens[8:9], 8)
    cache.keep(seq, tokens[4:9], 4)
    cache.keep(seq, tokens[8:9], 8)
    cache.keep(seq, tokens[:3])
    assert cache.kept(seq) == 8 and cache.find([*tokens[:9]]).length == 8
    cache.keep(twin, tokens[:8])
    run(cache, Chunk(twin, tokens[9:14]))
    cache.keep(twin, tokens[8:14], 8)
    assert cache.kept(twin) == 12 and cache.find(tokens).length == 12, "its third page follows two of the other's"
    fork, hit = cache.fork(twin, 11), cache.add(tokens)
    assert (cache.kept(fork), cache.kept(hit)) == (8, 12)
    cache.truncate(fork, 3)
    assert cache.kept(fork) == 0
    for one in (seq, fork, hit):
        cache.free(one)
    run(cache, Chunk(cache.add(), [7] * 16))  # takes the first two pages, that only the twin's third one leads to
    assert cache.find(tokens).length == cache.kept(twin) == 0
    run(cache, Chunk(twin, tokens[14:16]))
    cache.keep(twin, tokens[:16])
    assert cache.kept(twin) == 16 == cache.find(tokens).length
    cache.forget_prefixes()
    assert cache.kept(twin) == twin.length, "nothing more is kept of it"


def test_what_was_found_is_used_at_once() -> None:
    cache, tokens = cache_of(kv_tokens=32), list(range(40))
    known(cache, tokens[:9])
    found = cache.find(tokens[:10])
    assert (found.length, found.pages_to_admit) == (8, 3)
    seq = cache.add(found)
    assert (seq.length, cache.pages_in_use, cache.prefix_hits) == (8, 2, 1)
    cache.free(seq)
    nothing = cache.find([99], salt="a")
    run(cache, Chunk(cache.add(), [7] * 28))
    with pytest.raises(ValueError, match=r"what was found is known no more; call find\(\) again"):
        cache.add(found)
    assert cache.add(nothing).length == 0
    cache.forget_prefixes()
    with pytest.raises(ValueError, match="known no more"):
        cache.add(nothing)


def test_other_weights_make_other_keys() -> None:
    cache, weight = cache_of(), torch.zeros(1)
    cache.proof.check("graph", [weight])
    old = cache.add()
    run(cache, Chunk(old, [1] * 8))
    cache.keep(old, [1] * 8)
    assert cache.add([1] * 9).length == 8
    weight.add_(1)
    assert cache.add([1] * 9).length == 0
    cache.keep(old, [1] * 8)  # it has begun with the weights from before
    assert cache.add([1] * 9).length == cache.find([1] * 9).pages_to_admit - 3 == 0
    known(cache, [1] * 8)
    hit = cache.add([1] * 9)
    assert hit.length == 8
    cache.proof.check("compiled anew", [weight])
    assert cache.add([1] * 9).length == 0
    with pytest.raises(StalePrefix, match=r"length=8, pages=2\) begins with keys that it found, and the model has changed"):
        cache.batch([Chunk(hit, [1])])


def test_a_sequence_in_the_batch_that_is_the_first_of_a_model_is_known() -> None:
    """What compiles the model, or notices that it is another one, is a step: all that it computes is of the new one."""
    cache, weight = cache_of(), torch.zeros(1)
    earlier, empty = cache.add(), cache.add()
    for graph in ("first", "second", "first"):
        seq = cache.add()
        cache.batch([Chunk(seq, [1] * 8), Chunk(earlier, [1] * 4)])
        cache.proof.check(graph, [weight])
        cache.step_inputs()
        cache.keep(earlier, [1] * earlier.length)
        assert (cache.add([1] * 9).length > 0) == (earlier.length == 4), "it was begun under the first model"
        cache.keep(seq, [1] * 8)
        assert cache.add([1] * 9).length == 8
    run(cache, Chunk(empty, [2] * 4))
    cache.keep(empty, [2] * 4)
    assert cache.add([2] * 9).length == 4, "it was added long ago, and has begun now"


def test_a_batch_that_must_not_run_is_taken_back() -> None:
    cache, weight = cache_of(poison=True), torch.zeros(1)
    cache.bind([layer_kv()], owner=0)
    cache.proof.check("graph", [weight])
    other = cache.add()
    run(cache, Chunk(other, [1] * 6))
    cache.keep(other, [1] * 6)
    hit, new, gone = cache.add([1] * 6), cache.add(), cache.add()
    before, free = other.pages, cache.free_pages
    cache.batch([Chunk(hit, [1] * 2), Chunk(other, [2] * 3), Chunk(new, [3] * 5), Chunk(gone, [4])])
    cache.free(gone)
    weight.add_(1)
    with pytest.raises(StalePrefix):
        cache.proof.check("graph", [weight])
    assert [(seq.length, seq.unrun) for seq in (hit, other, new)] == [(4, False), (6, False), (0, False)]
    assert other.pages == before and cache.free_pages == free and cache.current is None and gone.pages == ()
    with pytest.raises(ValueError, match="before any batch was made"):
        cache.step_inputs()
    for made_by in (hit, cache.fork(hit), cache.fork(hit, 2)):
        with pytest.raises(StalePrefix, match="begins with keys that it found"):
            cache.batch([Chunk(new, [3] * 5), Chunk(made_by, [1])])
    cache.truncate(hit, 0)
    cache.batch([Chunk(other, [2]), Chunk(new, [3] * 5), Chunk(hit, [1] * 5)])
    cache.proof.check("graph", [weight])
    cache.step_inputs()
    cache.keep(hit, [1] * 5)
    assert cache.add([1] * 5).length == 4


def test_a_resized_cache_knows_nothing() -> None:
    cache = cache_of()
    known(cache, [1] * 8)
    cache.resize(32)
    assert cache.add([1] * 9).length == 0 and cache.free_pages == 8


# Forks and shorter sequences


def test_a_fork_copies_when_one_of_the_two_writes() -> None:
    cache = cache_of(poison=True)
    cache.bind([layer_kv()], owner=0)
    a = cache.add()
    run(cache, Chunk(a, [1] * 6))
    cache.k_pages[0][list(a.pages)] = torch.arange(2.0)[:, None, None, None] + 5
    b = cache.fork(a)
    assert a.pages == b.pages and (b.length, cache.pages_in_use) == (6, 2)
    shared = a.pages
    assert cache.pages_wanted(a, 1) == cache.pages_wanted(b, 1) == 1 and cache.pages_wanted(b, 3) == 2
    run(cache, Chunk(b, [7]))
    assert a.pages == shared and b.pages[0] == shared[0] and b.pages[1] != shared[1], "who writes first takes the copy"
    assert cache.k_pages[0][b.pages[1]].eq(6).all() and table(cache)[0] == [*b.pages]
    assert cache.pages_wanted(a, 1) == 0, "the other one owns its page alone now"
    run(cache, Chunk(a, [8]), Chunk(b, [8]))
    assert a.pages == shared and table(cache) == [[*a.pages], [*b.pages]]
    cache.free(a)
    assert cache.pages_in_use == 2 and not cache.k_pages[0][b.pages[0]].isnan().any()


def test_of_two_in_one_batch_the_second_writes_its_own_page() -> None:
    cache = cache_of(kv_tokens=12)
    a = cache.add()
    run(cache, Chunk(a, [1] * 6))
    b = cache.fork(a)
    shared = a.pages
    run(cache, Chunk(b, [7]), Chunk(a, [8]))
    assert cache.free_pages == 0 and a.pages == shared and b.pages != shared and table(cache) == [[*b.pages], [*a.pages]]


def test_a_fork_of_a_part() -> None:
    cache = cache_of()
    a = cache.add()
    run(cache, Chunk(a, [1] * 10))
    for length, wanted in ((0, 1), (3, 1), (4, 1), (5, 1), (8, 1), (9, 1), (10, 1)):
        b = cache.fork(a, length)
        assert (b.length, b.pages) == (length, a.pages[: cache.pages_for(length)]) and cache.pages_wanted(b, 1) == wanted
        run(cache, Chunk(b, [2]))
        assert len({*a.pages} & {*b.pages}) == length // 4
        cache.free(b)
    assert cache.pages_in_use == 3


def test_forking_and_running_out_changes_nothing() -> None:
    cache = cache_of(kv_tokens=12)
    a = cache.add()
    run(cache, Chunk(a, [1] * 6))
    b, c = cache.fork(a), cache.fork(a)
    before = (a.pages, b.pages, c.pages, cache.free_pages)
    with pytest.raises(OutOfPages, match=r"3 chunks and 3 new tokens needs 2 more pages; 1 of 3 are free"):
        cache.batch([Chunk(seq, [2]) for seq in (a, b, c)])
    assert (a.pages, b.pages, c.pages, cache.free_pages) == before and not a.unrun
    run(cache, Chunk(b, [2]))
    assert a.pages == c.pages == before[0] != b.pages


def test_300_forks_of_one_page() -> None:
    cache = cache_of(kv_tokens=2048)
    a = cache.add()
    run(cache, Chunk(a, [1] * 3))
    forks = [cache.fork(a) for _ in range(299)]
    assert cache.pages_in_use == 1 and cache._seqs.pages.references(a.pages[0]) == 300
    for seq in (*forks, a):
        run(cache, Chunk(seq, [2]))
    assert cache.pages_in_use == len({seq.pages for seq in (*forks, a)}) == 300
    for seq in (*forks, a):
        cache.free(seq)
    assert cache.pages_in_use == 0


def test_a_shorter_sequence_gives_its_pages_back() -> None:
    cache = cache_of(poison=True)
    cache.bind([layer_kv()], owner=0)
    a = cache.add()
    run(cache, Chunk(a, [1] * 14))
    cache.k_pages[0].zero_()
    pages = a.pages
    cache.truncate(a, 14)
    assert a.pages == pages
    cache.truncate(a, 6)
    assert (a.length, a.pages, cache.pages_in_use) == (6, pages[:2], 2)
    assert cache.k_pages[0][list(pages[2:])].isnan().all() and not cache.k_pages[0][list(pages[:2])].isnan().any()
    other = cache.add()
    run(cache, Chunk(other, [1] * 2), Chunk(a, [5] * 3))
    assert table(cache) == [[*other.pages], [*a.pages]] and other.pages[0] == pages[2] and len(a.pages) == 3
    cache.truncate(a, 0)
    assert a.pages == () and run(cache, Chunk(a, [1])) == [[0]]


def test_a_known_page_is_not_written_by_a_shorter_sequence() -> None:
    cache = cache_of()
    a = cache.add()
    run(cache, Chunk(a, [1] * 8))
    cache.keep(a, [1] * 8)
    pages = a.pages
    cache.truncate(a, 6)
    assert cache.pages_wanted(a, 1) == 0, "the page that it leaves comes free for the one it takes"
    before = cache.free_pages
    run(cache, Chunk(a, [2]))
    assert a.pages[0] == pages[0] and a.pages[1] != pages[1] and table(cache)[0] == [*a.pages] and cache.free_pages == before
    assert cache.add([1] * 9).pages == pages


def decoding(cache: PagedKVCache) -> tuple[CachedSequence, CachedSequence]:
    """Two sequences whose next step the device could make by itself."""
    a, b = cache.add(), cache.add()
    run(cache, Chunk(a, [1] * 5), Chunk(b, [1]))
    run(cache, Chunk(a, [1]), Chunk(b, [1]))
    assert cache.advanced_width() is not None
    return a, b


def test_what_changes_a_sequence_ends_the_steady_steps() -> None:
    for change in (lambda cache, a: cache.fork(a), lambda cache, a: cache.truncate(a, 2), lambda cache, a: cache.free(a)):
        cache = cache_of()
        a, _ = decoding(cache)
        change(cache, a)
        assert cache.advanced_width() is None


def test_keeping_and_beginning_go_beside_the_steady_steps() -> None:
    """No step writes what is kept, and no page of the batch changes: so a server that keeps every prompt decodes on."""
    cache = cache_of()
    a, _ = decoding(cache)
    cache.keep(a, [1] * 6)
    hit = cache.add([1] * 6)
    assert cache.advanced_width() is not None and hit.length == 4
    shared = a.pages
    cache.advance()
    assert a.pages == shared and cache._seqs.pages.references(shared[0]) == 2 and cache._seqs.pages.references(shared[1]) == 1


def test_who_can_be_forked_shortened_or_kept() -> None:
    cache = cache_of()
    seq = cache.add()
    cache.batch([Chunk(seq, [1, 2, 3])])
    for refused in (lambda: cache.fork(seq), lambda: cache.truncate(seq, 1), lambda: cache.keep(seq, [1, 2, 3])):
        with pytest.raises(ValueError, match="was in a batch that was never run"):
            refused()
    cache.step_inputs()
    for length in (-1, 4, 1.0, True):
        with pytest.raises(ValueError, match=r"length=.* of CachedSequence\(length=3, pages=1\); it has 0 to 3 tokens"):
            cache.truncate(seq, length)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="it has 0 to 3 tokens"):
            cache.fork(seq, length)  # type: ignore[arg-type]
    cache.free(seq)
    for refused in (lambda: cache.fork(seq), lambda: cache.truncate(seq, 0), lambda: cache.keep(seq, [1])):
        with pytest.raises(ValueError, match="was freed"):
            refused()
