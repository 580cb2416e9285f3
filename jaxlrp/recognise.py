"""Block -> Body: equations grouped into Ops, wrappers closed again where no Op crosses them.

Order of claims: embeddings, softmax, attention, norms, local response normalisation, shifts by a maximum, activations,
linear runs, interleavings, trees of adds, runs of scales, and what nothing claims stays an Op of one equation. An Op
computes all that it is made of (what is read elsewhere too is computed there as well), so replacing it by a
`custom_vjp` whose forward pass is its own equations never changes the forward value.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import primitives as p

from . import _compat
from .activations import claim_activations
from .attention import claim_attention
from .errors import UnknownPrimitiveError
from .facts import Facts
from .graph import Draft, Graph
from .kinds import STRUCTURAL, kind_of
from .norms import claim_norms
from .program import Block, Body, Equation, Group, Loop, Op, Step, Value, Wrapper, leaves
from .ranges import interleaved
from .response import claim_response
from .runs import claim_linear, parameter_step
from .single import classify, in_complex_numbers
from .softmax import claim_shifts, claim_softmax
from .source import source_of
from .tokens import embeds

_PLAIN = frozenset((p.jit_p, p.remat_p, p.closed_call_p))  # JAX's own derivative goes through them


def recognise(block: Block, facts: Facts) -> Body:
    """Groups the block's equations, and those of the loops in it, into Ops."""
    graph = Graph(block, facts)
    _check_references(graph)
    _claim_complex(graph)
    _claim_embeddings(graph)
    claim_softmax(graph)
    claim_attention(graph)
    claim_norms(graph)
    claim_response(graph)
    claim_shifts(graph)
    claim_activations(graph)
    claim_linear(graph)
    _claim_interleavings(graph)
    _claim_adds(graph)
    _claim_scales(graph)
    for e in graph.equations:
        if graph.free(e) and not (e.bodies and graph.relevant(e)):
            _claim_single(graph, e)
    _absorb(graph)
    steps = tuple(_lower(graph, block.nodes, {}))
    carries = tuple(graph.fact(a).data for a in block.outputs)
    return Body(block.inputs, block.outputs, block.constants, steps, carries)


def _claim_embeddings(graph: Graph) -> None:
    """Every equation in which ids become numbers; index arithmetic before it is run as it stands."""
    for e in graph.equations:
        if graph.data(e) or not embeds(e, [graph.fact(a).token for a in e.inputs]):
            continue
        # a batched index is one of several, the others none of the explained ids
        index = [graph.producer.get(v) for v in graph.tokens(e)]
        joined = [m for m in index if m is not None and m.primitive is p.concatenate_p and e.primitive is p.gather_p]
        ids = [v for m in joined or [e] for v in graph.tokens(m)]
        known = len(ids) == 1 and (e.primitive is not p.gather_p or ids[0].aval.shape[-1] == 1)
        kind = "embedding" if known else "unknown"
        graph.claim(Draft(kind, "embedding", [e], e.outputs[0], e, shared=joined))


def _claim_interleavings(graph: Graph) -> None:
    """Two values that a sum puts into each other's gaps: they are moved, not added."""
    for e in graph.equations:
        pads = interleaved(e, graph.producer)
        region = [*pads, e]
        if pads and len(graph.data(e)) == 2 and graph.sealed(region, e.outputs[0]):
            graph.claim(Draft("structural", "interleave", region, e.outputs[0], e))


def _check_references(graph: Graph) -> None:
    """Raises UnknownPrimitiveError for a mutable array: what is written to it is no flow of data that can be seen."""
    for e in graph.equations:
        if any(isinstance(f, _compat.REFERENCE) for f in e.eqn.effects):
            raise UnknownPrimitiveError(
                f"the primitive {str(e.primitive)!r} ({_source(graph, e)}) makes, reads or writes a mutable array "
                f"(jax.Ref), through which relevance cannot be followed; write x = x.at[...].set(...)"
            )


def _claim_complex(graph: Graph) -> None:
    """Each equation in complex numbers is an Op of its own, but for those that only move them."""
    for e in graph.equations:
        if graph.carries(e) and not e.bodies and in_complex_numbers(graph, e):
            _claim_single(graph, e)


def _claim_adds(graph: Graph) -> None:
    """A tree of sums and differences whose inner values are read once is one n-ary add."""
    for e in reversed(graph.equations):
        if not _adds(graph, e):
            continue
        tree, todo = [e], [e]
        while todo:
            for v in graph.data(todo.pop()):
                inner = graph.producer.get(v)
                if inner is not None and _adds(graph, inner) and graph.reader(v) is not None and inner not in tree:
                    tree.append(inner)
                    todo.append(inner)
        graph.claim(Draft("add", "add", tree, e.outputs[0], e))


def _adds(graph: Graph, e: Equation) -> bool:
    return kind_of(e.primitive) == "add" and graph.free(e) and len(graph.data(e)) == 2


def _claim_scales(graph: Graph) -> None:
    """Sums and products of one data value with parameters, in a row: a BatchNorm if a factor came from a root."""
    for e in graph.equations:
        if not graph.free(e) or parameter_step(graph, e) is None:
            continue
        run = [e]
        while (follower := graph.reader(run[-1].outputs[0])) is not None:
            if not graph.free(follower) or parameter_step(graph, follower) is None:
                break
            run.append(follower)
        others = [parameter_step(graph, step) for step in run]
        norm = len(run) > 1 and any(graph.fact(o).root for o in others if o is not None)
        kind = "batch_norm" if norm else "scale"
        graph.claim(Draft(kind, kind, run, run[-1].outputs[0], run[0]))


def _claim_single(graph: Graph, e: Equation) -> None:
    if not graph.data(e) or not e.outputs:  # what has no output (a debug print) is run as it stands
        return
    kind, label = classify(graph, e)
    output = next((v for v in e.outputs if graph.fact(v).data), e.outputs[0])
    graph.claim(Draft(kind, label, [e], output, e))


def _absorb(graph: Graph) -> None:
    """Literals that a wrapper turns into arrays for one Op alone become part of it, so that the wrapper closes."""
    several = graph.results | {v for draft in graph.claims.values() for e in draft.shared for v in e.values}
    for e in reversed(graph.equations):
        if graph.free(e) and e.scopes and graph.literal(e) and several.isdisjoint(e.outputs):
            owners = {graph.claims.get(r) for v in e.outputs for r in graph.readers.get(v, [])}
            owner = owners.pop() if len(owners) == 1 else None
            if owner is not None:
                owner.equations.append(e)
                graph.claim(owner)


def _lower(graph: Graph, nodes: Sequence[Equation], done: dict[Draft, list[Equation]]) -> list[Step]:
    """The steps of these nodes; an Op stands where its last equation stood, when all its inputs are there."""
    steps: list[Step] = []
    for node in nodes:
        live = [e for e in leaves([node]) if e in graph.position]
        if not live:
            continue
        owners = {graph.claims.get(e) for e in live}
        loops = any(e.bodies and graph.relevant(e) for e in live)
        whole = not isinstance(node, Wrapper) or (_closes(node) and all(graph.known(v) for v in node.values))
        # what moves ids is evaluated equation by equation, wrappers opened
        whole = whole and not (owners == {None} and isinstance(node, Wrapper) and any(map(graph.relevant, live)))
        if len(owners) == 1 and not loops and whole:
            (owner,) = owners
            if owner is None:
                steps.append(node)
                continue
            done.setdefault(owner, []).append(node)
            if owner.equations[-1] in live:
                steps.append(_op(graph, owner, done.pop(owner)))
        elif not isinstance(node, Wrapper):
            bodies = tuple(recognise(b, graph.facts) for b in node.bodies)
            tokens = tuple(tuple(graph.facts[v].token for v in b.inputs) for b in node.bodies)
            made = tuple(graph.facts[v].token for v in node.outputs)
            constant, replaced = _constant_carries(graph, node), _replaced(graph, node, bodies)
            steps.append(Loop(node, bodies, constant, replaced, tokens, made))
        else:
            inside = set(live)
            crossed = any(o is not None and not inside.issuperset(o.equations) for o in owners)
            inner = _lower(graph, node.children, done)
            closes = node.primitive in (p.jit_p, p.remat_p) and not crossed
            steps.extend([_group(graph, node, inside, inner)] if closes else inner)
    return steps


def _closes(node: Equation) -> bool:
    """Whether no wrapper has a derivative of the user's making, which relevance must not follow."""
    return not isinstance(node, Wrapper) or (node.primitive in _PLAIN and all(map(_closes, node.children)))


def _constant_carries(graph: Graph, e: Equation) -> tuple[int, ...]:
    if e.primitive is not p.scan_p:
        return ()
    consts, carries = _compat.scan_arity(e.params)
    inner = e.bodies[0].inputs
    pairs = enumerate(zip(e.inputs[consts:], inner[consts:], strict=True))
    return tuple(i for i, (a, v) in pairs if i < carries and graph.facts[v].data and not graph.fact(a).data)


def _replaced(graph: Graph, e: Equation, bodies: tuple[Body, ...]) -> tuple[tuple[int, ...], ...]:
    carries = _compat.scan_arity(e.params) if e.primitive is p.scan_p else None
    data = [graph.facts[v].data for v in e.outputs]
    if carries is not None:
        consts, count = carries
        inner = e.bodies[0].inputs[consts : consts + count]
        data[:count] = [d or graph.facts[v].data for d, v in zip(data, inner, strict=False)]
    return tuple(tuple(j for j, d in enumerate(data) if d and not b.carries[j]) for b in bodies)


def _group(graph: Graph, node: Wrapper, inside: set[Equation], steps: list[Step]) -> Group:
    made = dict.fromkeys(v for e in graph.equations if e in inside for v in e.outputs)
    inputs = dict.fromkeys(v for s in steps for v in _reads(s) if v not in made)
    outputs = [v for v in made if v in graph.results or any(r not in inside for r in graph.readers.get(v, []))]
    return Group(node, tuple(steps), tuple(inputs), tuple(outputs))


def _reads(step: Step) -> Sequence[Value]:
    if isinstance(step, Op):
        return (*step.inputs, *step.params)
    if isinstance(step, Group):
        return step.inputs
    if isinstance(step, Loop):
        return step.equation.values
    return tuple(v for e in (step, *leaves([step])) for v in e.values)


def _source(graph: Graph, e: Equation) -> str:
    """Where the user wrote it; a body that JAX traced before, for another call, says so only of its wrapper."""
    around = (graph.wrappers[key] for key in reversed(e.scopes))
    return next((s for s in (source_of(x.eqn) for x in (e, *around)) if s), "")


def _gates(graph: Graph, inputs: Sequence[Value]) -> tuple[bool, ...]:
    """Which of these are gates: those that the model marks or, where it marks none, those in [0, 1] or of a softmax."""
    marked = tuple(graph.fact(v).marked for v in inputs)
    return marked if any(marked) else tuple(graph.fact(v).gate or _made_by(graph, v, "softmax") for v in inputs)


def _made_by(graph: Graph, value: Value, label: str) -> bool:
    """Whether `value` is the output of a layer of this kind or label, moved or not."""
    while (e := graph.producer.get(value)) is not None:
        draft = graph.claims.get(e)
        if draft is not None and draft.kind != "structural":
            return label in (draft.kind, draft.label) and value is draft.output and draft.label != "log_softmax"
        if e.primitive not in STRUCTURAL or len(graph.data(e)) != 1 or len(graph.derived(e)) != 1:
            return False
        (value,) = graph.data(e)
    return False


def _op(graph: Graph, draft: Draft, nodes: Sequence[Equation]) -> Op:
    steps = (*draft.shared, *nodes)
    made = {v for e in leaves(steps) for v in e.outputs}
    # a wrapper also reads what its body leaves unused; its body also reads constants
    read = dict.fromkeys(v for e in (*steps, *draft.equations) for v in e.values if v not in made)
    embeds = draft.kind in ("embedding", "unknown")
    inputs = tuple(v for v in read if graph.fact(v).data or (embeds and graph.fact(v).token))
    params = tuple(v for v in read if v not in inputs)
    kernel = [draft.linear.core.inputs[1 - draft.linear.slot]] if draft.linear else []
    paths = dict.fromkeys(n for v in [*kernel, *params] for n in graph.fact(v).names)
    return Op(
        kind=draft.kind,
        label=draft.label,
        inputs=inputs,
        params=params,
        output=draft.output,
        steps=steps,
        source=_source(graph, draft.main),
        paths=tuple(paths),
        linear=draft.linear,
        nonneg=tuple(graph.fact(v).nonneg for v in inputs),
        gates=_gates(graph, inputs),
        activated=tuple(_made_by(graph, v, "activation") for v in inputs),
        scope=str(draft.main.eqn.source_info.name_stack),
        stopped=any(graph.fact(v).derived for v in params),
    )
