"""The built-in objectives as C++ functors, and a digest of a set of objectives."""

import ast
import hashlib

from rlkernels.objectives.language import OBJECTIVES

WIDEST = 4
"""The columns and the parameters that a kernel over rows holds: ``kWidest`` of ``csrc/cuda/objective.cuh``."""
SYMBOLS = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.USub: "-",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}


def expression(node):
    """Returns an expression of the objective language in C++."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Constant(value=x):
            return f"S({x!r})"
        case ast.UnaryOp(op=op, operand=x):
            return f"({SYMBOLS[type(op)]}{expression(x)})"
        case ast.BinOp(left=a, op=op, right=b) | ast.Compare(left=a, ops=[op], comparators=[b]):
            return f"({expression(a)} {SYMBOLS[type(op)]} {expression(b)})"
        case ast.Call(func=ast.Name(id=f), args=args):
            return f"rlk::{f}({', '.join(map(expression, args))})"
    # Unreachable for a registered objective, because the checker of the language admits no other expression.
    raise SyntaxError(f"no C++ form for {ast.unparse(node)!r}")


def functor(name):
    """Returns the C++ struct of one objective, a template over the scalar (float, double)."""
    objective = OBJECTIVES[name]
    *assignments, last = objective.tree.body[1:]
    lines = [f"const S {a.targets[0].id} = {expression(a.value)};" for a in assignments]
    lines.append("return {" + ", ".join(map(expression, last.value.elts)) + "};")
    arguments = ", ".join(f"S {a}" for a in objective.columns + objective.params)
    body = "\n".join("    " + line for line in lines)
    return (
        f"struct {name} {{\n  template <class S>\n  RLK_HD Term<S> operator()({arguments}) const {{\n{body}\n  }}\n}};"
    )


def builtin():
    """Returns the names of the objectives that come with the library, in the order of registration."""
    return [name for name, entry in OBJECTIVES.items() if entry.ours]


def table(macro, names):
    """Returns a C++ macro ``macro(X)`` that expands to ``X(name, columns, parameters)`` for each name."""
    return f"#define {macro}(X) \\\n" + " \\\n".join(
        (f"  X({n}, {len(OBJECTIVES[n].columns)}, {len(OBJECTIVES[n].params)})") for n in names
    )


def _of_rows(entry):
    """Tells whether the kernels over rows evaluate an objective: one of log-probabilities, of few numbers.

    ``kl_term`` is left out, because a KL term has no numbers in those kernels, and eight cost all others registers.
    """
    return entry.columns[0] == "logp" and len(entry.params) <= WIDEST


def body(names):
    """Returns the lists of objectives, and a functor for each objective."""
    of_rows = [n for n in names if _of_rows(OBJECTIVES[n])]
    tables = f"{table('RLK_OBJECTIVES', names)}\n\n{table('RLK_ROW_OBJECTIVES', of_rows)}"
    functors = "\n\n".join(map(functor, names))
    return f"{tables}\n\nnamespace rlk {{\n\n{functors}\n\n}}  // namespace rlk\n"


def digest(names=None):
    """Returns a digest by which a compiled module of these objectives differs from one of others.

    A comment or a docstring does not change it.
    """
    return hashlib.sha256(body(builtin() if names is None else names).encode()).hexdigest()[:16]
