"""The logits of a model that nobody computed: hidden states, head, and all that the model did after the head."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rlkernels.integrations.transformers.attached import host
from rlkernels.linear.head import without_autocast
from rlkernels.linear.sft_loss import linear_sft_loss
from rlkernels.linear.token_stats import linear_token_logprobs

REDUCTIONS = {"mean": "token-mean", "sum": "token-sum"}
"""The reductions of ``torch.nn.functional.cross_entropy`` and the aggregation that is the same."""


@dataclass(frozen=True, eq=False)
class HeadInputs(Mapping[str, Any]):
    """The arguments that ``linear_*`` functions take from a model, to be spread: ``linear_sft_loss(**head, ...)``.

    The logits are ``softcap tanh(logit_scale (h W^T + b) / softcap)``, without a softcap ``logit_scale (h W^T + b)``.

    Attributes:
        hidden: ``[..., H]``, what the model gave to its head, in the dtype that the head would have multiplied.
        weight: ``[V, H]``, the matrix of the head, with adapters merged; gradients reach the parameters.
        bias: ``[V]`` or None.
        softcap: None, or the bound of the logits.
        logit_scale: the factor of the logits.
        valid_vocab: None, or the number of columns that the model keeps; the others are padding.
        outputs: what the model returned, for its auxiliary losses; not spread.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    valid_vocab: int | None = None
    outputs: Any = None

    def __iter__(self) -> Iterator[str]:
        yield from ("hidden", "weight", "bias", "softcap", "logit_scale", "valid_vocab")

    def __len__(self) -> int:
        return 6

    def __getitem__(self, name: str) -> Any:
        if name not in tuple(self):
            raise KeyError(name)
        return getattr(self, name)

    def __repr__(self) -> str:
        numbers = f"softcap={self.softcap}, logit_scale={self.logit_scale}, valid_vocab={self.valid_vocab}"
        bias = "" if self.bias is None else f", bias={tuple(self.bias.shape)}"
        return f"HeadInputs(hidden={tuple(self.hidden.shape)}, weight={tuple(self.weight.shape)}{bias}, {numbers})"


@dataclass(frozen=True, eq=False)
class DeferredLogits:
    """The result of a head that did not multiply: it records what a model does to its logits.

    Known are factors, a softcap, a bias, casts, columns cut off behind the vocabulary, and any selection of rows. A
    cast to 16 bits does not round, because the losses keep their logits in fp32.
    ``torch.nn.functional.cross_entropy`` of it is ``linear_sft_loss``. Anything else raises TypeError with the name of
    the operation.

    Attributes:
        hidden, weight, bias: the operands of the head, in the dtype that it would have multiplied.
        owner: the name of the model.
        dtype: the dtype that the model's own logits would have.
        inner, outer: factors as (numerator, denominator), before and after the softcap; ``outer`` is None without one.
        valid_vocab: columns that are kept, None for all.
        partitioned: whether ZeRO-3 holds the parameters of the head.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    owner: str
    dtype: torch.dtype
    inner: tuple[float, float] = (1.0, 1.0)
    outer: tuple[float, float] | None = None
    valid_vocab: int | None = None
    partitioned: bool = False

    # -- what it stands for ------------------------------------------------------------------------------------------

    def head(self, outputs: Any = None) -> HeadInputs:
        """Returns the operands and the numbers that say how logits come of them.

        Raises:
            RuntimeError: the weight was taken away after the forward, by ZeRO-3 or by FSDP.
            TypeError: a softcap that is not positive.
        """
        if self.weight.numel() == 0 or not _has_memory(self.weight):
            raise RuntimeError(
                f"{self.owner}: the weight of the head was released after its forward. Gather it around the call and "
                "the backward: with ZeRO-3 deepspeed.zero.GatheredParameters([head.weight]), with FSDP2 "
                "fully_shard(..., reshard_after_forward=False) on the module that holds the head"
            )
        scale = self.inner[0] / self.inner[1]
        softcap = None
        if self.outer is not None:
            softcap = self.outer[0] / self.outer[1]
            if not softcap > 0:
                raise TypeError(f"{self.owner}: the model multiplies the tanh of its logits by {softcap}, expected > 0")
            scale = (self.inner[0] * self.outer[0]) / (self.inner[1] * self.outer[1])
        return HeadInputs(self.hidden, self.weight, self.bias, softcap, scale, self.valid_vocab, outputs)

    def check_backward(self, caller: str) -> None:
        """Refuses a loss that is taken of these logits after the forward of an engine of ZeRO-3.

        The engine begins its backward at the tensors that the model's forward returned, and there is none.
        """
        if self.partitioned and self.requires_grad:
            raise RuntimeError(
                f"{caller}: ZeRO-3 partitions the head of {self.owner}, and its backward needs a loss that a forward "
                "returned; call attach(model) and pass the labels to the model, or take the loss within the forward of "
                "a module that the engine wraps"
            )

    def materialize(self) -> Tensor:
        """Computes the logits ``[..., V]`` in plain torch, in the dtype that the model's own have."""
        logits = torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        logits = logits * self.inner[0] / self.inner[1]
        if self.outer is not None:
            logits = logits.tanh() * self.outer[0] / self.outer[1]
        return logits[..., : self.valid_vocab].to(self.dtype)

    # -- what a model may ask ----------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        columns = self.weight.shape[0] if self.valid_vocab is None else self.valid_vocab
        return torch.Size((*self.hidden.shape[:-1], columns))

    @property
    def ndim(self) -> int:
        return self.hidden.dim()

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        return torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (self.hidden, self.weight, self.bias)
        )

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.hidden.dim()

    # -- what a model may do -----------------------------------------------------------------------------------------

    def __mul__(self, factor: Any) -> "DeferredLogits":
        return self._scaled("multiplication", factor, 0)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "DeferredLogits":
        return self._scaled("division", divisor, 1)

    mul, div = __mul__, __truediv__

    def _scaled(self, operation: str, number: Any, place: int) -> "DeferredLogits":
        if isinstance(number, bool) or not isinstance(number, Real) or number == 0:
            raise self._unknown(f"a {operation} by {_described(number)}, where only numbers other than 0 are known")
        factors = list(self.inner if self.outer is None else self.outer)
        factors[place] *= float(number)
        pair = (factors[0], factors[1])
        return replace(self, inner=pair) if self.outer is None else replace(self, outer=pair)

    def tanh(self) -> "DeferredLogits":
        """Begins a softcap."""
        if self.outer is not None:
            raise self._unknown("a second tanh")
        return replace(self, outer=(1.0, 1.0))

    def __add__(self, bias: Any) -> "DeferredLogits":
        columns = self.weight.shape[0]
        one_row = isinstance(bias, Tensor) and bias.numel() == columns and bias.shape[-1:] == (columns,)
        if not one_row or self.outer is not None or self.inner != (1.0, 1.0) or self.valid_vocab is not None:
            raise self._unknown(
                f"an addition of {_described(bias)}, where only a bias [{columns}] of the head is known"
            )
        bias = bias.reshape(columns).to(self.weight.dtype)
        return replace(self, bias=bias if self.bias is None else self.bias + bias)

    __radd__ = __add__

    def to(self, *args: Any, **kwargs: Any) -> "DeferredLogits":
        """Casts, without rounding; moves nowhere."""
        dtype, logits = self.dtype, self
        for wanted in (*args, *kwargs.values()):
            if isinstance(wanted, torch.dtype):
                dtype = wanted
            elif isinstance(wanted, Tensor):
                dtype = wanted.dtype
            elif not isinstance(wanted, bool) and torch.device(wanted) not in (
                self.device,
                torch.device(self.device.type),
            ):
                raise self._unknown(f"a move to {wanted}")
        if not dtype.is_floating_point:
            raise self._unknown(f"a cast to {dtype}")
        return replace(logits, dtype=dtype)

    def float(self) -> "DeferredLogits":
        return self.to(torch.float32)

    def contiguous(self) -> "DeferredLogits":
        return self

    def detach(self) -> "DeferredLogits":
        hidden, weight = self.hidden.detach(), self.weight.detach()
        return replace(self, hidden=hidden, weight=weight, bias=None if self.bias is None else self.bias.detach())

    def reshape(self, *shape: Any) -> "DeferredLogits":
        """Reshapes the rows; the columns stay."""
        sizes = tuple(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if not sizes or sizes[-1] not in (-1, self.shape[-1]):
            raise self._unknown(f"a view as {sizes} of logits {tuple(self.shape)}, which moves columns")
        if sizes[-1] == -1:  # torch would divide it; the rows that remain must be those that are here
            rows = torch.Size(sizes[:-1]).numel()
            if rows != self.hidden.shape[:-1].numel():
                raise self._unknown(f"a view as {sizes} of logits {tuple(self.shape)}, which moves columns")
        return replace(self, hidden=self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1]))

    view = reshape

    def __getitem__(self, index: Any) -> "DeferredLogits":
        parts = list(index) if isinstance(index, tuple) else [index]
        taken = sum(part.dim() if _is_mask(part) else 1 for part in parts if part is not None and part is not Ellipsis)
        columns = slice(None)
        if any(part is Ellipsis for part in parts) or taken == self.ndim:
            if parts[-1] is not Ellipsis and taken and not _is_mask(parts[-1]):
                columns = parts.pop()
        if not isinstance(columns, slice) or columns.start not in (None, 0) or columns.step not in (None, 1):
            raise self._unknown(f"a selection of columns by {_described(columns)}, where only the first ones are known")
        stop = self.shape[-1] if columns.stop is None else columns.stop
        stop = stop + self.shape[-1] if stop < 0 else min(stop, self.shape[-1])
        if any(part is Ellipsis for part in parts) and index is not Ellipsis:
            parts.append(slice(None))  # of the features, which stand where the columns stood
        valid = self.valid_vocab if stop == self.shape[-1] else stop
        return replace(self, hidden=self.hidden[tuple(parts)] if parts else self.hidden, valid_vocab=valid)

    # A tensor-parallel head hands its result to a hook that gathers it; here the weight is gathered already.
    placements = None

    def redistribute(self, *args: Any, **kwargs: Any) -> "DeferredLogits":
        return self

    def to_local(self) -> "DeferredLogits":
        return self

    # -- what it refuses, and the loss -------------------------------------------------------------------------------

    def _unknown(self, operation: str) -> TypeError:
        return TypeError(
            f"{self.owner}: between its head and its loss or result the model takes {operation}. The logits are not "
            "computed here: leave this model to its own forward, or call materialize() for logits [..., V]"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(str(self._unknown(f"Tensor.{name}")))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise self._unknown("an assignment to columns or rows")

    def __bool__(self) -> bool:
        raise self._unknown("a truth value")

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        logits = next(x for x in pytree.tree_leaves((args, kwargs), is_leaf=_is_deferred) if _is_deferred(x))
        known: dict[Any, Callable[..., Any]] = {
            torch.nn.functional.cross_entropy: _cross_entropy,
            torch.tanh: DeferredLogits.tanh,
            torch.mul: _product,
            Tensor.mul: _product,
            Tensor.__mul__: _product,
            Tensor.__rmul__: _product,
            torch.div: DeferredLogits.__truediv__,
            torch.add: _sum,
            Tensor.add: _sum,
            Tensor.__add__: _sum,
            Tensor.__radd__: _sum,
        }
        if function not in known:
            raise logits._unknown(f"torch's {getattr(function, '__name__', function)}")
        return known[function](*args, **kwargs)


def _is_deferred(x: Any) -> bool:
    return isinstance(x, DeferredLogits)


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype == torch.bool


def _described(x: Any) -> str:
    return f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


def _has_memory(weight: Tensor) -> bool:
    """Says whether the storage holds the elements; FSDP frees it and keeps the tensor."""
    if weight.is_meta or torch.compiler.is_compiling():
        return True
    return weight.untyped_storage().size() >= weight.numel() * weight.element_size()


def _product(a: Any, b: Any) -> DeferredLogits:
    return a * b if _is_deferred(a) else b * a


def _sum(a: Any, b: Any) -> DeferredLogits:
    return a + b if _is_deferred(a) else b + a


def _cross_entropy(
    input: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes ``torch.nn.functional.cross_entropy`` of deferred logits ``[T, V]`` by ``linear_sft_loss``.

    A mean over no target is 0 and differentiable, where torch's is NaN.
    """
    if not _is_deferred(input):
        raise TypeError("cross_entropy: the deferred logits must be the input, not the target")
    for name, value, default in (
        ("weight", weight, None),
        ("size_average", size_average, None),
        ("reduce", reduce, None),
        ("label_smoothing", label_smoothing, 0.0),
    ):
        if value is not default and value != default:
            raise input._unknown(f"cross_entropy with {name}={_described(value)}")
    if input.ndim != 2 or not isinstance(target, Tensor) or target.is_floating_point():
        raise input._unknown(f"cross_entropy of logits {tuple(input.shape)}, where [T, V] and class indices are known")
    arguments: dict[str, Any] = {**input.head(), "targets": target, "ignore_index": ignore_index}
    with without_autocast(input.device.type):  # the operands were cast as autocast said
        if reduction == "none":
            loss = -linear_token_logprobs(**arguments)
        elif reduction in REDUCTIONS:
            arguments["aggregation"] = REDUCTIONS[reduction]
            loss = linear_sft_loss(**arguments)
        else:
            raise ValueError(f"cross_entropy: reduction is {reduction!r}, expected one of none, mean, sum")
    host.served("cross_entropy")
    return loss


def _flatten(logits: DeferredLogits) -> tuple[list[Any], DeferredLogits]:
    return [logits.hidden], logits


def _unflatten(hidden: Any, logits: DeferredLogits) -> DeferredLogits:
    hidden = list(hidden)[0]
    if isinstance(hidden, Tensor) and hidden.dtype != logits.weight.dtype:
        return replace(logits, hidden=hidden.to(logits.weight.dtype), dtype=hidden.dtype)
    return replace(logits, hidden=hidden)


# FSDP2 walks a model's result by pytree, and hangs the gathering of parameters for the backward on each tensor in it.
pytree.register_pytree_node(DeferredLogits, _flatten, _unflatten)
