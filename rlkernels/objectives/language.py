"""``@objective``: checks a scalar function against the objective language and registers it.

The language is the part of Python that Triton and C++ can express, too. A function has positional arguments, a
docstring, statements ``name = expression``, and one final ``return value, derivative``. Expressions are arguments,
locals, float literals, ``+ - * /``, unary ``-`` and calls of the names in ``rlkernels.objectives.functions``; a
comparison stands only as the condition of ``where``. The derivative is with respect to the first argument.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, overload

from rlkernels.objectives import functions

COLUMNS = (
    "logp",
    "old_logp",
    "ref_logp",
    "rollout_logp",
    "advantage",
    "value",
    "old_value",
    "returns",
    "margin",
    "log_ratio",
    "mean_logp",
)
"""The names of arguments that are columns, with one number per row. Any other argument is one float per launch."""

ARITY = {name: len(inspect.signature(function).parameters) for name, function in functions.FUNCTIONS.items()}
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div)
COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
CXX_KEYWORDS = frozenset(
    "auto bool case catch char const default delete do double enum explicit extern float friend goto inline int long "
    "mutable "
    "namespace new operator private protected public register short signed sizeof static struct switch template this "
    "throw "
    "typedef typename union unsigned using virtual void volatile".split()
)
INSTEAD = {
    ast.Pow: "multiply: x * x",
    ast.IfExp: "where(condition, a, b)",
    ast.If: "where(condition, a, b)",
    ast.BoolOp: "a nested where(...)",
    ast.Compare: "a comparison only as the first argument of where",
    ast.Attribute: "the bare name: exp(x), not torch.exp(x)",
    ast.AugAssign: "an assignment to a new name",
    ast.Subscript: "separate arguments",
}


class Objective(NamedTuple):
    """A registered objective: its function, the names of its columns and parameters, and its syntax tree."""

    function: Callable
    columns: tuple[str, ...]
    params: tuple[str, ...]
    tree: ast.FunctionDef


OBJECTIVES: dict[str, Objective] = {}
Function = TypeVar("Function", bound=Callable[..., Any])


@overload
def objective(function: Function, *, columns: int | None = None) -> Function: ...


@overload
def objective(function: None = None, *, columns: int | None = None) -> Callable[[Function], Function]: ...


def objective(function: Any = None, *, columns: int | None = None) -> Any:
    """Registers ``function`` and returns it unchanged, so that a call runs it on torch's tensors.

    Args:
        columns: the number of leading arguments that are columns. By default the arguments named in ``COLUMNS``.

    Raises:
        TypeError: ``function`` leaves the objective language; the message names the construct and what to write.
        ValueError: the name is taken by another function.

    Example:
        >>> @objective
        ... def halved(logp, advantage):
        ...     "Half of REINFORCE."
        ...     return -0.5 * advantage * logp, -0.5 * advantage
        >>> OBJECTIVES.pop("halved").columns
        ('logp', 'advantage')
    """
    if function is None:
        return lambda f: objective(f, columns=columns)
    if getattr(function, "__name__", "<lambda>") == "<lambda>":
        raise TypeError(
            "objective: expected a function with a name, got "
            f"{'a lambda' if callable(function) else type(function).__name__}; define it with def"
        )
    name = function.__name__
    tree = _parse(function)
    names = _arguments(function)
    count = sum(n in COLUMNS for n in names) if columns is None else columns
    if count == 0 or columns is None and not all(n in COLUMNS for n in names[:count]):
        raise TypeError(f"objective {name!r}: columns {COLUMNS} come first, then parameters; got {names}")
    known = OBJECTIVES.get(name)
    if known is not None and _identity(known.function) != _identity(function):
        raise ValueError(f"objective {name!r} is already registered by {known.function.__module__}")
    _Checker(name, function, names).check(tree)
    OBJECTIVES[name] = Objective(function, names[:count], names[count:], tree)
    return function


def _identity(function):
    """Returns the place of a function; the same place again is no conflict, because a notebook cell may run twice."""
    return function.__module__, function.__qualname__


def _parse(function):
    """Returns the syntax tree of a function."""
    try:
        source = inspect.getsource(function)
    except OSError as error:
        raise TypeError(
            f"objective {function.__name__!r} must be defined in a file or a notebook cell: no source found"
        ) from error
    return ast.parse(textwrap.dedent(source)).body[0]


def _arguments(function):
    """Returns the names of a function's arguments; refuses defaults and arguments by keyword."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty for p in parameters):
        raise TypeError(f"objective {function.__name__!r}: positional arguments without defaults only")
    return tuple(p.name for p in parameters)


class _Checker:
    """The check of one function against the language, statement by statement."""

    def __init__(self, name, function, arguments):
        self.name, self.function, self.known = name, function, set(arguments)

    def check(self, tree):
        docstring, *body = tree.body
        if ast.get_docstring(tree) is None or not body:
            self.fail(docstring, "a docstring first: the sentence, the formula, the paper")
        for name in self.known:
            self.fresh(name, tree)
        for statement in body[:-1]:
            self.assignment(statement)
        last = body[-1]
        if not (isinstance(last, ast.Return) and isinstance(last.value, ast.Tuple) and len(last.value.elts) == 2):
            self.fail(last, "a final 'return value, derivative'")
        for element in last.value.elts:
            self.expression(element)

    def assignment(self, node):
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            self.fail(node, INSTEAD.get(type(node), "assignments 'name = expression'"))
        self.expression(node.value)
        name = node.targets[0].id
        if name in self.known:
            self.fail(node, "a new name: C++ prints each local as a constant")
        self.fresh(name, node)
        self.known.add(name)

    def fresh(self, name, node):
        if name in ARITY or name in CXX_KEYWORDS:
            raise TypeError(
                f"objective {self.name!r}, line {node.lineno}: {name!r} is a function of the language or a word of "
                "C++; write another name"
            )

    def expression(self, node):
        match node:
            case ast.Name(id=name) if name in self.known:
                return
            case ast.Constant(value=float()):
                return
            case ast.Constant(value=int()):
                self.fail(node, f"a float literal, {node.value}.0: C++ would divide integers")
            case ast.UnaryOp(op=ast.USub(), operand=x):
                return self.expression(x)
            case ast.BinOp(left=a, op=op, right=b) if isinstance(op, OPERATORS):
                return self.expression(a), self.expression(b)
            case ast.BinOp(op=op):
                self.fail(node, INSTEAD.get(type(op), "+ - * /"))
            case ast.Call(func=ast.Name(id=f), args=args, keywords=[]) if len(args) == ARITY.get(f):
                if self.function.__globals__.get(f) is not functions.FUNCTIONS[f]:
                    self.fail(
                        node, f"{f} imported from rlkernels.objectives: kernels replace that function and no other"
                    )
                if f == "where":
                    self.condition(args[0])
                    args = args[1:]
                return [self.expression(x) for x in args]
            case ast.Call():
                self.fail(
                    node, "a call, with positional arguments, of " + ", ".join(f"{f}/{n}" for f, n in ARITY.items())
                )
        self.fail(
            node,
            INSTEAD.get(
                type(node), "arguments, earlier locals, float literals, + - * / and the functions of the language"
            ),
        )

    def condition(self, node):
        match node:
            case ast.Compare(left=a, ops=[op], comparators=[b]) if isinstance(op, COMPARISONS):
                return self.expression(a), self.expression(b)
        self.fail(node, "one comparison < <= > >= as the condition of where")

    def fail(self, node, instead):
        raise TypeError(
            f"objective {self.name!r}, line {node.lineno}: {ast.unparse(node)!r} is not in the language; "
            f"write {instead}"
        )
