"""Chat templates as Python that pays for what it does."""

# ruff: noqa: N802, N815 - the names are Jinja's

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension

from loomtune_plugins.models.templates_budget import Forbidden

MANY = 20_000
"""Statements and expressions of a template; Python takes seconds to compile more."""

STEP = 100
"""What a turn of a loop, or a call, costs beside what it makes."""

REFUSED = (nodes.Import, nodes.FromImport, nodes.Include, nodes.Extends, nodes.ScopedEvalContextModifier)
CALLS = (nodes.Call, nodes.Filter, nodes.Test)
BODIES = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)


class Generation(Extension):
    """`{% generation %}` marks what the assistant says. Here that is found without marks, and they do nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _paying(visit: Callable[..., None]) -> Callable[..., None]:
    """What makes a list, or compares, and pays for it."""

    def paying(self: CodeGenerator, node: Any, frame: Any) -> None:
        stored = getattr(node, "ctx", "load") != "load"
        self.write("(" if stored else f"environment.budget.{'passed' if isinstance(node, nodes.Compare) else 'made'}(")
        visit(self, node, frame)
        self.write(")")

    return paying


class Generator(CodeGenerator):
    """Writes templates as Python that pays. Nothing is computed while it does."""

    visit_List = _paying(CodeGenerator.visit_List)
    visit_Tuple = _paying(CodeGenerator.visit_Tuple)
    visit_Dict = _paying(CodeGenerator.visit_Dict)
    visit_Compare = _paying(CodeGenerator.visit_Compare)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concat([environment.told(value) for value in (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")])")

    def visit_Call(self, node: nodes.Call, frame: Any, forward_caller: bool = False) -> None:
        if isinstance(node.node, nodes.EnvironmentAttribute):
            self.write(f"environment.{node.node.name}(")
            self.visit(node.args[0], frame)
            self.write(")")
        else:
            super().visit_Call(node, frame, forward_caller=forward_caller)

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if isinstance(node.arg, nodes.Slice):
            self.write("environment.cut(")
            super().visit_Getitem(node, frame)
            self.write(")")
        else:
            super().visit_Getitem(node, frame)

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def _output_child_pre(self, node: nodes.Expr, frame: Any, finalize: Any) -> None:
        self.write("environment.told(")


def bound(source: nodes.Template) -> None:
    """Has each body of a loop, a macro or a block pay for each time that it runs, and for all that it writes then.

    Raises Forbidden for a template that is too long to be compiled, or has other templates in it.
    """
    if len([*source.find_all(nodes.Node)]) > MANY:
        raise Forbidden(f"it has more than {MANY} statements and expressions")
    for found in source.find_all(REFUSED):
        raise Forbidden(f"it has a statement of the kind '{type(found).__name__.lower()}'")
    calls: list[Any] = [*source.find_all(CALLS)]
    for call in calls:
        call.dyn_args = call.dyn_args and _walked(call.dyn_args)
    for loop in [*source.find_all(nodes.For)]:
        loop.iter = _walked(loop.iter)
    for body in [*source.find_all(BODIES)]:
        written: list[nodes.Node] = body.body  # type: ignore[attr-defined]
        size = sum(8 + len(getattr(one, "data", "")) for one in _outputs(written))
        step = nodes.EnvironmentAttribute(f"budget.spend({STEP + 4 * size})")
        written.insert(0, nodes.ExprStmt(step, lineno=body.lineno))


def _walked(values: Any) -> Any:
    """Of what a loop goes through, or a star unpacks: paid for before that begins."""
    paying = nodes.EnvironmentAttribute("walked")
    return nodes.Call(paying, [values], [], None, None, lineno=values.lineno).set_environment(values.environment)


def _outputs(body: Sequence[nodes.Node]) -> Iterable[nodes.Node]:
    for node in body:
        for output in [node] if isinstance(node, nodes.Output) else node.find_all(nodes.Output):
            yield from output.nodes
