"""Is every spelling of attention read for what it means, rewritten to the same numbers, and every near miss left alone?"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from compile_attn.kernels.expr import B, H, I, J
from compile_attn.kernels.mask import Mask
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.passes.pipeline import Rewriting, rewrite_stateless
from compile_attn.passes.recognise import recognise
from compile_attn.passes.report import Rejected
from tests.capture import captured
from tests.forms import biases, fused, layouts, masks, outputs, plain, scales, sinks
from tests.forms.form import TOKENS, Form, NearMiss

TOLERANCE = 1e-5  # float32, values of order 1: softmax and product in another order of summation
ROOMS = (plain, scales, biases, masks, sinks, layouts, fused, outputs)
STATELESS = [*(form for room in ROOMS for form in room.FORMS), *fused.FLEX]
DATA = (*masks.DATA_FORMS, *fused.FLEX_DATA)  # their masks are data of the call: captured tensors, in one way or another
FORMS = [*STATELESS, *DATA]
pytestmark = [pytest.mark.filterwarnings("ignore:flex_attention called without"), pytest.mark.usefixtures("no_grad")]
NEAR = {near.run.__name__: (form, near) for form in FORMS for near in form.near}


def _names(form: Form) -> str:
    return form.run.__name__


def _dynamic(inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, int]]:
    return [(x, 1) for x in inputs]


def _read(form: Form, module: nn.Module, batch: int, paged: bool) -> tuple[list[AttentionSpec], list[Rejected]]:
    inputs = form.arguments(batch)
    normalized = captured(module, *inputs, dynamic=_dynamic(inputs))
    sites, rejected = recognise(normalized, paged=paged, positions=frozenset())
    return [site.spec for site in sites], rejected


def _same_mask(found: Mask, wanted: Mask) -> bool:
    """Equal as values, or, for General, equal as predicates on a box."""
    if found == wanted:
        return True
    if type(found) is not type(wanted):
        return False
    a, b = (sympy.lambdify((B, H, I, J), mask.predicate()) for mask in (found, wanted))
    return all(bool(a(0, 0, i, j)) == bool(b(0, 0, i, j)) for i in range(24) for j in range(24))


def _assert_spec(form: Form, found: AttentionSpec, batch: int) -> None:
    wanted = form.spec
    assert form.check(found), found.words()
    # A model that merges B and H on one axis has B * H heads, or B * H sequences; with packed queries B * Hkv sequences.
    merged = Fraction(found.num_q_heads, wanted.num_q_heads)
    assert merged in (1, batch, Fraction(1, wanted.num_kv_heads)), found.words()
    assert (found.num_q_heads, found.num_kv_heads) == (merged * wanted.num_q_heads, merged * wanted.num_kv_heads), found.words()
    assert (found.head_dim, found.head_dim_v) == (wanted.head_dim, wanted.head_dim_v), found.words()
    if found.score is None:
        assert found.scale == pytest.approx(wanted.scale, rel=1e-6), found.words()
        assert (found.softcap is None) == (wanted.softcap is None), found.words()
        assert wanted.softcap is None or found.softcap == pytest.approx(wanted.softcap, rel=1e-6)


def _leaves(output: object) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)  # type: ignore[call-overload]


def _assert_same(found: object, wanted: object) -> None:
    for one, other in zip(_leaves(found), _leaves(wanted), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


def _compiled(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Rewriting, object]:
    """What the backend's own entry makes of one call, run without an inner compiler."""
    found: list[Rewriting] = []

    def backend(gm: Any, examples: Any) -> Any:
        found.append(rewrite_stateless(gm, examples, kernel="auto"))
        return found[-1].module.forward

    for tensor, dim in _dynamic(inputs):
        torch._dynamo.mark_dynamic(tensor, dim)
    output = torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    return found[0], output


def test_every_form_says_who_writes_it_and_has_a_near_miss() -> None:
    for form in FORMS:
        assert form.run.__doc__, form.run.__name__
        assert any(not near.readable for near in form.near), form.run.__name__


@pytest.mark.parametrize("form", FORMS, ids=_names)
def test_form_is_read_when_paged(form: Form) -> None:
    specs, rejected = _read(form, form.module(), batch=1, paged=True)
    if form.paged is None:
        assert len(specs) == 1, rejected
        _assert_spec(form, specs[0], batch=1)
    else:
        assert specs == [] and len(rejected) == 1, specs
        assert re.search(form.paged, rejected[0].reason), rejected


@pytest.mark.parametrize("form", FORMS, ids=_names)
def test_form(form: Form) -> None:
    """One site, of the expected meaning; nothing left beside the fused op; the same numbers."""
    module, inputs = form.module(), form.arguments()
    wanted = module(*inputs)
    rewriting, found = _compiled(module, inputs)
    assert len(rewriting.report.sites) == 1, rewriting.report.rejected
    site = rewriting.report.sites[0]
    _assert_spec(form, site.spec, batch=2)
    assert form in DATA or _same_mask(site.spec.mask, form.spec.mask), site.spec.mask
    left = [node.name for node in rewriting.module.graph.nodes if {"softmax", "exp", "logsumexp"} & set(node.name.split("_"))]
    assert left == [], "the fused op stands beside what it replaces"
    _assert_same(found, wanted)


@pytest.mark.parametrize("form", [room.FORMS[0] for room in ROOMS], ids=_names)
def test_one_compilation_serves_every_length(form: Form) -> None:
    module = form.module()
    fast = torch.compile(module, backend="paged_attn", options={"inner": "eager", "on_rejected": "error"})
    compiled = counters["stats"]["unique_graphs"]
    for tokens in (TOKENS, 2, 17):
        inputs = form.arguments(tokens=tokens)
        for tensor, dim in _dynamic(inputs):
            torch._dynamo.mark_dynamic(tensor, dim)
        _assert_same(fast(*inputs), module(*inputs))
    assert counters["stats"]["unique_graphs"] == compiled + 1


@pytest.mark.parametrize("name", NEAR)
def test_near_miss_is_left_alone(name: str) -> None:
    form, near = NEAR[name]
    module, inputs = form.module(near.run), form.arguments()
    if near.paged:
        return _assert_refused_when_paged(form, near)
    torch.manual_seed(0)
    wanted = module(*inputs)
    torch.manual_seed(0)
    rewriting, found = _compiled(module, inputs)
    if near.readable and rewriting.report.sites:
        return _assert_same(found, wanted)
    assert rewriting.report.sites == ()
    assert rewriting.report.rejected, "refused in silence"
    assert any(re.search(near.reason, one.reason, re.IGNORECASE) for one in rewriting.report.rejected), rewriting.report.rejected
    assert all(one.where.node and one.where.source and one.cure for one in rewriting.report.rejected)
    assert rewriting.report.before == rewriting.report.after
    return _assert_same(found, wanted)


def _assert_refused_when_paged(form: Form, near: NearMiss) -> None:
    specs, rejected = _read(form, form.module(near.run), batch=1, paged=True)
    assert specs == [] and rejected, specs
    assert any(re.search(near.reason, one.reason, re.IGNORECASE) for one in rejected), rejected
    assert all(one.where.node and one.where.source and one.cure for one in rejected)
