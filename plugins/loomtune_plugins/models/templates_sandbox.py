"""Renders chat templates as transformers does, in a sandbox of our own.

Jinja's sandbox keeps templates from Python's internals, but lets them loop and grow for ever. Here every step is paid
for (`templates_budget`), and what may be reached at all is listed, not what may not. What a template writes is the same
as `apply_chat_template` writes, with one exception: `strftime_now` says when the template was first read, so that a
conversation that is rendered in parts around midnight is of one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from sys import getsizeof
from types import BuiltinMethodType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import loopcontrols
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, safe_range
from jinja2.utils import Cycler, Joiner, Namespace

from loomtune_plugins.models.templates_budget import BYTES, CONTAINERS, EMPTY, Budget, Forbidden
from loomtune_plugins.models.templates_code import STEP, Generation, Generator, bound
from loomtune_plugins.models.templates_filters import WIDEST, Guards, filters, tests

SHORT = 2**12
"""Characters of texts that need no second look."""

SOME = 2**21
"""Bytes that fit four times into what any rendering has."""

CONTEXT = ("_loop_vars", "_block_vars")
"""What Jinja adds to the arguments of a call."""

OF_DICTS = frozenset(dir(dict))

REACHED: Sequence[tuple[Any, frozenset[str]]] = tuple(
    (kind, frozenset(names.split()))
    for kind, names in (
        (
            str,
            "capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit islower "
            "isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace "
            "rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill",
        ),
        (dict, "get items keys values copy"),
        (list, "index count copy"),
        (tuple, "index count grouper list"),
        (LoopContext, "index index0 revindex revindex0 first last length depth depth0 previtem nextitem cycle changed"),
        (Macro, "name arguments catch_kwargs catch_varargs caller"),
        (Cycler, "next reset current"),
    )
)
"""What a template may ask of values, by their kind."""


class _Namespace(Namespace):
    """Without names of internals, and told without what is in it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        Namespace.__init__(self, {_named(name): value for name, value in dict(*rest, **kwargs).items()})

    def __setitem__(self, name: str, value: Any) -> None:
        Namespace.__setitem__(self, _named(name), value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _named(name: Any) -> Any:
    if isinstance(name, str) and name.startswith("_"):
        raise Forbidden(f"it stores '{name}' on a namespace")
    return name


def _own(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in CONTEXT}


def _raised(message: Any) -> None:
    raise TemplateError(message)


class _Formatter(SandboxedFormatter):
    """Of `str.format`: fields are reached as elsewhere, and padded within reason."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if any(len(digits) > 4 for digits in "".join(c if c.isdigit() else " " for c in format_spec).split()):
            raise Forbidden("it pads what it formats by thousands of characters")
        said = value if isinstance(value, str | int | float) else self._env.told(value)  # type: ignore[attr-defined]
        return self._env.budget.made(super().format_field(said, format_spec))  # type: ignore[attr-defined,no-any-return]

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        if conversion:
            self._env.told(value)  # type: ignore[attr-defined]
        return super().convert_field(value, conversion)


class Sandbox(ImmutableSandboxedEnvironment):
    """Where one template lives, for one thread."""

    code_generator_class = Generator
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        extensions = [Generation, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, cache_size=0)
        self.budget = Budget()
        self._guards, now = Guards(self.budget), datetime.now()
        self._methods = self._guards.methods()
        self.filters, self.tests = dict[str, Any](filters(self.budget)), dict[str, Any](tests(self.budget))
        self.globals = {"range": safe_range, "dict": dict, "cycler": Cycler, "joiner": Joiner, "namespace": _Namespace}
        self.globals |= {"raise_exception": _raised, "strftime_now": lambda form: now.strftime(form[:WIDEST])}

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        bound(source)
        return super()._generate(source, *args, **kwargs)

    def told(self, value: Any) -> str:
        """A value in words, as it is written."""
        budget = self.budget
        if type(value) is str:
            budget.left -= len(value) + STEP
            if budget.left < budget.mark:
                budget.look()
            return value
        if isinstance(value, CONTAINERS):
            budget.afford(10 * budget.size(value))
        return budget.made(str(value))  # type: ignore[no-any-return]

    def concat(self, parts: Iterable[str]) -> str:
        """One text of many, each of which was told. So they are few where little is spent."""
        budget, parts = self.budget, list(parts)
        if budget.grown or budget.left < BYTES - SOME:
            budget.room(parts)
        return budget.made("".join(parts))  # type: ignore[no-any-return]

    def walked(self, values: Any) -> Any:
        """What a loop goes through, or a star unpacks."""
        return self.budget.walked(values)

    def cut(self, part: Any) -> Any:
        """Part of a text or of a list, of which nothing within is new."""
        self.budget.spend(len(part) * 8 if isinstance(part, list | tuple) else STEP + len(part) * 4)
        return part

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As Jinja's, but that a message's own keys are not looked for elsewhere first."""
        if type(obj) is dict and attribute not in OF_DICTS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """What is listed, and the names that a template gave itself."""
        if attr.startswith("_"):
            return False
        return isinstance(obj, Namespace) or any(isinstance(obj, kind) and attr in names for kind, names in REACHED)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, whose fields are held to what is held everywhere."""
        text = getattr(value, "__self__", None)
        if type(text) is not str or not isinstance(value, BuiltinMethodType):
            return None
        if value.__name__ not in ("format", "format_map"):
            return None
        spread = value.__name__ == "format_map"

        def formatted(*args: Any, **kwargs: Any) -> str:
            return _Formatter(self).vformat(text, () if spread else args, args[0] if spread else kwargs)

        return formatted

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls what a template may reach, which is all that it can name."""
        budget = self.budget
        budget.spend(STEP)
        budget.look()
        text = getattr(obj, "__self__", None) if isinstance(obj, BuiltinMethodType) else None
        if isinstance(text, str):
            if obj.__name__ == "join" and len(args) == 1:
                parts = [*budget.walked(args[0])]
                budget.room([text, *parts], len(text) * len(parts))
                return budget.made(text.join(parts))
            if guard := self._methods.get(obj.__name__):
                guard(text, *args, **_own(kwargs))
        elif isinstance(obj, Macro):
            budget.made([args, _own(kwargs)])  # which it may keep
        elif isinstance(obj, LoopContext):
            for values in (*args, *kwargs.values()):
                budget.walked(values)
        return budget.made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes what is small enough."""
        if operator == "+":
            if type(left) is str and type(right) is str and (length := len(left) + len(right)) < SHORT:
                self.budget.spend(4 * length + EMPTY)
                return left + right
            if isinstance(left, str) and isinstance(right, str):
                self.budget.room((left, right))
            result = left + right
            return self.cut(result) if isinstance(result, list | tuple) else self.budget.made(result)
        if operator == "*":
            self._check_many(left, right)
        elif operator == "**" and not (isinstance(right, int | float) and abs(right) < 64):
            raise Forbidden("it computes a large power")
        elif operator == "%" and isinstance(left, str):
            self._guards.printf(left, right)
        return self.budget.made(super().call_binop(context, operator, left, right))

    def _check_many(self, left: Any, right: Any) -> None:
        for many, count in ((left, right), (right, left)):
            if isinstance(count, int) and isinstance(many, str):
                self.budget.afford(len(many) * count * (1 if many.isascii() else 4))
            elif isinstance(count, int) and isinstance(many, list | tuple):
                self.budget.afford((self.budget.size(many) - getsizeof(many)) * count)
