"""Does only attention mix tokens, and if so, how does the model read a packed batch?

`prove_tokens` follows the token axis through the graph, refuses what is not proven to treat each token by itself, and rewrites
positions, tables, the last token and the rows of the output.
The rules are in `token_rules`, `token_axes`, `token_views` and `token_moe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from compile_attn.passes import emit, token_axes, token_chosen, token_moe, token_rules, token_views
from compile_attn.passes.bounds import NotABound, upper_bound
from compile_attn.passes.graph import Location, location, output_node, val
from compile_attn.passes.report import Rejected, TokenRewrite
from compile_attn.passes.token_context import Context, is_row
from compile_attn.passes.token_rewrites import Rewriter
from compile_attn.passes.token_rows import Mover
from compile_attn.passes.token_values import LAST, TOKENS, Axis, Mixed, Sizes, Tok

_aten = torch.ops.aten
_CURE = "a paged model may mix tokens by causal attention only; serve this one without a cache"
_RULE_FILES = (token_rules, token_axes, token_views, token_moe, token_chosen)  # imported for the rules that they register


@dataclass(frozen=True)
class TokenProof:
    """What was rewritten; the most positions that the model's tables serve; the most tokens that one call may hold."""

    rewrites: tuple[TokenRewrite, ...]
    max_positions: int | None
    max_tokens: int | None


class TokensRefused(Exception):
    """The model is not proven to treat each token by itself outside attention; the graph is unchanged."""

    def __init__(self, rejected: list[Rejected]) -> None:
        super().__init__("; ".join(reason.reason for reason in rejected))
        self.rejected = rejected


def prove_tokens(
    gm: fx.GraphModule,
    *,
    tokens: list[fx.Node],
    positions: fx.Node,
    rows: fx.Node,
    constants: dict[fx.Node, torch.Tensor],
    position_inputs: frozenset[fx.Node],
    rejected: list[Rejected],
) -> TokenProof:
    """Prove that tokens are independent outside `paged_attn::attention`, then make the graph read a packed batch.

    tokens: placeholders [1, T]; those in `position_inputs` hold positions. positions: [T] int64, the position of each packed
    token in its sequence. rows: [R] int64, the tokens whose logits are wanted. rejected: sites that were not fused, whose
    reasons a refusal repeats. Raises TokensRefused, the graph unchanged.
    """
    length = val(tokens[0]).shape[1]
    if not isinstance(length, torch.SymInt) or not length.node.expr.is_Symbol:
        why = f"the number of tokens is fixed at {length}"
        raise TokensRefused([Rejected(why, location(tokens[0]), "compile with a dynamic number of tokens")])
    context = Context(Sizes(length), frozenset(tokens), position_inputs, constants)
    context.run(gm.graph)
    logits = _check(context, gm.graph, rejected)
    longest = _longest(length, tokens[0])
    rewriter = Rewriter(context, gm.graph, positions, rows, val(tokens[0]).fake_mode)
    rewriter.apply()
    _select_rows(context, rewriter, logits)
    gm.graph.lint()
    bounds = [*context.bounds, *([longest] if longest is not None else [])]
    return TokenProof(tuple(rewriter.done), min(bounds, default=None), _without_full_length(length, longest))


def _check(context: Context, graph: fx.Graph, rejected: Sequence[Rejected]) -> int:
    """The place of the logits among the outputs, or a refusal."""
    output = output_node(graph)
    bad: list[Mixed] = list(context.effects)
    logits: int | None = None
    outputs = output.args[0] if isinstance(output.args[0], (tuple, list)) else [output.args[0]]
    for place, arg in enumerate(outputs):
        if not isinstance(arg, fx.Node):
            continue
        value = context.payload(output, arg) if is_row(context.of(arg)) else context.of(arg)
        if isinstance(value, Mixed):
            bad.append(value)
        elif isinstance(value, Tok) and (not value.axis.plain or value.axis.space not in (TOKENS, LAST)):
            bad.append(Mixed(f"output {place} is not of one row per token", arg, "return logits of shape [1, T, V]"))
        elif isinstance(value, Tok) and logits is None and val(arg).is_floating_point():
            logits = place
    for user, arg in context.as_positions & context.as_rows:
        bad.append(Mixed(f"{arg} is read as positions and as row numbers by one op", user))
    if bad:
        raise TokensRefused(list(dict.fromkeys(_explain(reason, rejected) for reason in bad)))
    if logits is None:
        why = "no output has a row per token, so there are no logits"
        raise TokensRefused([Rejected(why, location(output), "return logits of shape [1, T, V], or x[:, -1:] of them")])
    return logits


def _explain(reason: Mixed, rejected: Sequence[Rejected]) -> Rejected:
    """A refusal; where it is attention that was left as it was, with the recogniser's own reason."""
    where = location(reason.node)
    near = _attention_near(reason.node, rejected)
    if near is None:
        return Rejected(reason.reason, where, reason.cure or _CURE)
    return Rejected(f"{reason.reason}; attention was left as it was: {near.reason}", where, near.cure or reason.cure or _CURE)


def _attention_near(node: fx.Node, rejected: Sequence[Rejected]) -> Rejected | None:
    """The rejected site that this node belongs to: one that it is, or that follows it closely, or of the same module."""
    by_name = {site.where.node: site for site in rejected}
    seen, todo = {node}, [node]
    for current in todo:
        if current.name in by_name:
            return by_name[current.name]
        todo.extend(user for user in current.users if user not in seen)
        seen.update(current.users)
        if len(todo) > 64:  # from the product of q and k to its softmax are 5 to 10 nodes in every model seen
            break
    module = location(node).module
    return next((site for site in rejected if module and site.where.module == module), None)


def _select_rows(context: Context, rewriter: Rewriter, place: int) -> None:
    """Logits of the wanted rows only, as [1, R, V] or [R, V]; the selection moves up to where it saves most."""
    graph, output = rewriter.graph, output_node(rewriter.graph)
    outputs = list(output.args[0]) if isinstance(output.args[0], (tuple, list)) else [output.args[0]]
    logits = outputs[place]
    assert isinstance(logits, fx.Node)
    value, rank = context.values[logits], rewriter.ranks[logits]
    live = {node for node in graph.nodes if node.users}
    selections = list(rewriter.selections)
    assert isinstance(value, Tok)
    with graph.inserting_before(output):
        if value.axis == Axis(TOKENS):
            chosen = emit.call(graph, _aten.index_select.default, logits, value.dim, rewriter.rows, like=logits)
            context.values[chosen] = Tok(value.dim, Axis(LAST))
            selections.append(chosen)
            outputs[place] = chosen
            output.args = (type(output.args[0])(outputs) if isinstance(output.args[0], (tuple, list)) else chosen,)
    moved = Mover(context, graph, rewriter.rows, selections).move()
    _rows_second(rewriter, place, value, rank)
    rewriter.erase_dead(live)
    if moved or value.axis == Axis(TOKENS):
        rewriter.note("rows", logits, f"only the wanted rows go through the last {moved} ops")


def _rows_second(rewriter: Rewriter, place: int, value: Tok, rank: int) -> None:
    """[R, 1, V], from a last token that lost its axis and got a new one, as [1, R, V]."""
    graph, output = rewriter.graph, output_node(rewriter.graph)
    outputs = output.args[0]
    logits = outputs[place] if isinstance(outputs, (tuple, list)) else outputs
    assert isinstance(logits, fx.Node)
    if value.axis.space is LAST and value.dim == 0 and rank == 3:
        with graph.inserting_before(output):
            turned = graph.call_function(_aten.transpose.int, (logits, 0, 1))
        output.replace_input_with(logits, turned)


def _longest(length: torch.SymInt, where: fx.Node) -> int | None:
    """The bound on T under which the captured program holds; a refusal where it holds for some lengths only.

    A guard says for which T the capture took the branches that it took. One that holds for every T >= 2 says nothing, and
    T <= c is a bound, on the length of each sequence too: beyond it the model may do something else. Any other guard means
    that the model does different things for sequences of different lengths, and a packed T is the length of none.
    """
    symbol = length.node.expr
    env = length.node.shape_env  # what was recorded while tracing; reading it adds no guard
    conditions = [(guard.expr, guard.sloc.maybe_user_loc or "") for guard in env.guards]
    if symbol in env.var_to_range:
        conditions.append((symbol <= env.var_to_range[symbol].upper, ""))
    found: list[int] = []
    for condition, source in conditions:
        if condition.free_symbols != {symbol} or (isinstance(condition, sympy.Ne) and symbol in condition.args):
            continue  # T != n only says that a broadcast against n rows did not happen
        try:
            bound = upper_bound(condition, symbol)
        except NotABound:
            why = f"the captured program holds only where T, the number of tokens, satisfies {condition}"
            cure = "let no branch and no number depend on the length of the input"
            raise TokensRefused([Rejected(why, Location(where.name, "", source), cure)]) from None
        if bound is not None:
            found.append(bound)
    return min(found, default=None)


def _without_full_length(length: torch.SymInt, longest: int | None) -> int | None:
    """The most tokens of a step. A table cut to [:T] also guards T != its length: Dynamo would capture that length apart."""
    symbol, guards = length.node.expr, length.node.shape_env.guards
    apart = any(isinstance(guard.expr, sympy.Ne) and set(guard.expr.args) == {symbol, sympy.sympify(longest)} for guard in guards)
    return longest - 1 if longest is not None and apart else longest


__all__ = ["TokenProof", "TokensRefused", "prove_tokens"]
