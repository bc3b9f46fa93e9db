"""Zero-gradient rows: a proof from an objective's source that its derivative is 0 wherever one column is 0.

An advantage of 0 is the common case: the products of the gradient may skip such a row.
"""

import ast
import functools
import operator

from rlkernels.objectives.language import OBJECTIVES

OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def still_where_zero(name, column):
    """Tells whether the derivative of the objective ``name`` is 0 in every row where ``column`` is 0.

    All other columns and parameters must be finite. False also where the proof fails.
    """
    return _still(OBJECTIVES[name], column)


@functools.cache
def _still(entry, column):
    """Proves ``still_where_zero`` for one entry; cached by the entry, because a name may be registered anew."""
    if column not in entry.columns:
        return False
    known = dict.fromkeys(entry.columns + entry.params) | {column: 0.0}
    *assignments, last = entry.tree.body[1:]
    for statement in assignments:
        known[statement.targets[0].id] = _constant(statement.value, known)
    return _constant(last.value.elts[1], known) == 0.0


def _constant(node, known):
    """Returns the number that an expression has for every value of the unknown columns, or None."""
    match node:
        case ast.Name(id=name):
            return known[name]
        case ast.Constant(value=x):
            return x
        case ast.UnaryOp(operand=x):
            x = _constant(x, known)
            return None if x is None else -x
        case ast.BinOp(left=a, op=op, right=b) | ast.Compare(left=a, ops=[op], comparators=[b]):
            a, b = _constant(a, known), _constant(b, known)
            if isinstance(op, ast.Mult) and 0.0 in (a, b) or isinstance(op, ast.Div) and a == 0.0 and b is None:
                return 0.0
            return (
                None if a is None or b is None or isinstance(op, ast.Div) and b == 0.0 else OPERATIONS[type(op)](a, b)
            )
        case ast.Call(func=ast.Name(id="where"), args=[condition, a, b]):
            condition, a, b = (_constant(x, known) for x in (condition, a, b))
            return (a if condition else b) if condition is not None else a if a == b else None
        case ast.Call(func=ast.Name(id="abs" | "tanh" | "sqrt"), args=[x]) if _constant(x, known) == 0.0:
            return 0.0
    return None  # a function of the language, of which nothing is known
