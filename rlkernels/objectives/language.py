"""``@objective``: checks a scalar function against the objective language and registers it.

The language is the part of Python that Triton and C++ can express, too. A function has positional arguments, a
docstring, statements ``name = expression``, and one final ``return value, derivative``. A parameter may have a number
as its default. Expressions are arguments, locals, float literals, ``+ - * /``, unary ``-`` and calls of the names in
``rlkernels.objectives.functions``; a comparison stands only as the condition of ``where``. The derivative is with
respect to the first argument.
"""

import ast
import functools
import inspect
import sys
import textwrap
import tokenize
import types
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
"""The names of arguments that are columns, with one number per row.

Any other argument is one float per launch, unless ``objective(columns=...)`` counts it among the columns.
"""

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
    """A registered objective: its function, the names of its columns and parameters, its syntax tree, its defaults.

    ``ours``: whether it comes with the library.
    """

    function: Callable
    columns: tuple[str, ...]
    params: tuple[str, ...]
    tree: ast.FunctionDef
    defaults: tuple[tuple[str, float], ...] = ()  # pairs, because an entry must be hashable
    ours: bool = False


PACKAGE = __name__.rpartition(".")[0] + "."
OBJECTIVES: dict[str, Objective] = {}
Function = TypeVar("Function", bound=Callable[..., Any])


@overload
def objective(function: Function, *, columns: int | None = None) -> Function: ...


@overload
def objective(function: None = None, *, columns: int | None = None) -> Callable[[Function], Function]: ...


def objective(function: Any = None, *, columns: int | None = None) -> Any:
    """Registers ``function`` and returns it unchanged, so that a call runs it on torch's tensors.

    Args:
        columns: the number of leading arguments that are columns. By default the arguments named in ``COLUMNS``. With
            it a column may have any name: a loss then takes it as a keyword, a tensor shaped like its other columns.

    Raises:
        TypeError: ``function`` leaves the objective language, or its source is nowhere to be read; the message names
            the construct and what to write.
        ValueError: the name is taken by another function; ``columns`` counts none, or more arguments than there are.

    Example:
        >>> @objective
        ... def halved(logp, advantage):
        ...     "Half of REINFORCE."
        ...     return -0.5 * advantage * logp, -0.5 * advantage
        >>> OBJECTIVES.pop("halved").columns
        ('logp', 'advantage')
        >>> @objective(columns=3)
        ... def gated(logp, advantage, gate, scale=0.5):
        ...     "REINFORCE, each token by its gate."
        ...     return -scale * gate * advantage * logp, -scale * gate * advantage
        >>> import rlkernels
        >>> logp, gate = torch.zeros(1, 2, requires_grad=True), torch.tensor([[1.0, 0.0]])
        >>> rlkernels.policy_loss(logp, None, torch.tensor([2.0]), objective=gated, gate=gate).backward()
        >>> OBJECTIVES.pop("gated").defaults, logp.grad
        ((('scale', 0.5),), tensor([[-0.5000, -0.0000]]))
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
    names, defaults = _arguments(function)
    count = _column_count(name, names, columns)
    for default in (n for n in names[:count] if n in defaults):
        raise TypeError(f"objective {name!r}: {default!r} is a column and has a default; only parameters have one")
    known = OBJECTIVES.get(name)
    if known is not None and _identity(known.function) != _identity(function):
        raise ValueError(f"objective {name!r} is already registered by {known.function.__module__}")
    _Checker(name, function, names).check(tree)
    if not _is_ours(function) and not _compiles_to(tree, function.__code__):
        # The kernels are made of the source. A file that changed after its import, and a second exec under the same
        # file name, leave the source of another function there.
        raise TypeError(_stale(function))
    OBJECTIVES[name] = Objective(
        function, names[:count], names[count:], tree, tuple(defaults.items()), _is_ours(function)
    )
    return function


def registered(objective: Any) -> Objective | None:
    """Returns the entry of an objective, by its name or by the function that was registered; None where there is none.

    A function that another one of the same name has replaced is not registered any more.
    """
    if isinstance(objective, str):
        return OBJECTIVES.get(objective)
    entry = OBJECTIVES.get(getattr(objective, "__name__", ""))
    return entry if entry is not None and entry.function is objective else None


def _column_count(name, names, columns):
    """Returns how many leading arguments are columns; refuses a column behind a parameter."""
    if columns is None:
        count = sum(n in COLUMNS for n in names)
        if count == 0 or not all(n in COLUMNS for n in names[:count]):
            raise TypeError(
                f"objective {name!r}: columns {COLUMNS} come first, then parameters; got {names}; with "
                "@objective(columns=k) the first k arguments are columns, whatever their names"
            )
        return count
    if isinstance(columns, bool) or not isinstance(columns, int):
        raise TypeError(f"objective {name!r}: columns must be int, got {type(columns).__name__}")
    if not 1 <= columns <= len(names):
        raise ValueError(f"objective {name!r}: columns={columns}, expected 1 to {len(names)}, its arguments")
    for late in (n for n in names[columns:] if n in COLUMNS):
        raise TypeError(f"objective {name!r}: columns={columns} leaves the column {late!r} among the parameters")
    return columns


def _identity(function):
    """Returns the place of a function; the same place again is no conflict, because a notebook cell may run twice."""
    return function.__module__, function.__qualname__


def _is_ours(function):
    """Tells whether a function is one of the library's own objectives."""
    return function.__module__.startswith(PACKAGE)


@functools.cache
def _our_functions(module):
    """Returns the syntax tree of each function of one of our modules of objectives, by its name.

    One parse of the module, because ``inspect.getsource`` takes 4 ms for each of forty functions, which every import of
    the library would wait for.
    """
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def _parse(function):
    """Returns the syntax tree of a function."""
    try:
        # The example of a docstring has the name of our module, but is no function of its file.
        ours = _our_functions(function.__module__).get(function.__name__) if _is_ours(function) else None
        if ours is not None:
            return ours
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError, LookupError, tokenize.TokenError) as error:
        raise TypeError(
            f"objective {function.__name__!r} must be defined in a file or a notebook cell: no source found; for code "
            "of exec, enter its source into linecache.cache under the file name of compile()"
        ) from error
    if not isinstance(tree, ast.FunctionDef):
        raise TypeError(_stale(function))
    return tree


def _stale(function):
    code = function.__code__
    return (
        f"objective {function.__name__!r}: the source at {code.co_filename}, line {code.co_firstlineno}, is not that "
        "of the function; import it anew, or define it under a file name of its own"
    )


def _compiles_to(tree, code):
    """Tells whether a syntax tree is that of a function's code: the same instructions, names and numbers."""
    bare = ast.FunctionDef(**{**dict(ast.iter_fields(tree)), "decorator_list": []})
    module = compile(ast.fix_missing_locations(ast.Module([ast.copy_location(bare, tree)], [])), "<objective>", "exec")
    return _essence(next(c for c in module.co_consts if isinstance(c, types.CodeType))) == _essence(code)


def _essence(code):
    numbers = tuple(repr(x) for x in code.co_consts if isinstance(x, (int, float)))  # not the docstring
    return code.co_name, code.co_code, code.co_varnames, code.co_names, numbers


def _arguments(function):
    """Returns the names of a function's arguments, and the defaults that some have; refuses arguments by keyword."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise TypeError(f"objective {function.__name__!r}: positional arguments only")
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    for name, x in defaults.items():
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise TypeError(f"objective {function.__name__!r}: the default of {name!r} must be a number, got {x!r}")
    return tuple(p.name for p in parameters), {name: float(x) for name, x in defaults.items()}


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
