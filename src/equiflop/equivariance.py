"""Is a function equivariant? The comparison that ``check`` and the tests of layers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from equiflop.contract import EquivariantLayer, EquivariantModel
from equiflop.groups import Action, FiniteGroup, Rep
from equiflop.image_group import ImageGroup

#: Largest relative error that passes, by dtype.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}

#: Outputs whose relative spread over different inputs is smaller than this count as constant.
MIN_SPREAD = 1e-3

#: How a group acts on tensors: by a function of the element and the tensors, by matrices along the last axis (``Rep``,
#: ``Action``), by moving the pixels of the last two axes (``ImageGroup``), or not at all (None).
Acts = Callable[..., Any] | Rep | Action | None


@dataclass(frozen=True)
class Comparison:
    """One output for one element.

    Attributes:
        element: the group element ``g``.
        what: the name of the output.
        error: ``max |f(g x) - g f(x)| / max |g f(x)|``; infinite where there is no number or another shape.
        note: in words, what is wrong with the shape, if anything is.
    """

    element: int
    what: str
    error: float
    note: str = ""


def assert_equivariant(
    fn: Callable[..., Any],
    act_in: Acts | Sequence[Acts],
    act_out: Acts | Sequence[Acts],
    elements: Iterable[int] | FiniteGroup | Action,
    inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    shape: Sequence[int] | Sequence[Sequence[int]] | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    tolerance: float | None = None,
) -> None:
    """Assert that ``fn(act_in(g, x)) = act_out(g, fn(x))`` for all ``elements``, and that this says something.

    Nothing of ``fn`` is changed: a module is called as it is, in its mode and with its parameters. Zeros hide mistakes,
    so fill fresh parameters with numbers first (:func:`equiflop.checking.randomize_parameters`).

    Args:
        fn: takes one tensor or several; returns a tensor, or a tuple or list of them.
        act_in: how the group acts on the input: a function ``act_in(g, x)``; a :class:`~equiflop.Rep` or
            :class:`~equiflop.Action`, which acts along the last axis; an :class:`~equiflop.ImageGroup`, which moves the
            pixels of the last two axes; or None, for inputs that stay. With several inputs, a tuple with one of these
            for each, or a function ``act_in(g, *x)`` that returns them all.
        act_out: the same for the output; None means that it is invariant.
        elements: the elements to try, such as ``range(group.order)``; a group or an action stands for all of its own.
        inputs: the input, or a tuple of inputs. By default random ones.
        shape: shape of a random input, or one shape for each. By default that of two samples of ``fn``, if it says its
            inputs (``sample_inputs``, ``in_rep``), or of what ``act_in`` acts on.
        dtype: dtype of random inputs; by default that of ``fn``'s parameters, or float64.
        seed: seed of random numbers.
        tolerance: largest relative error, ``max |difference| / max |expected|``; by default by dtype (``TOLERANCES``),
            the coarsest of inputs and outputs.

    Raises:
        AssertionError: with one line that names element, relative error and tolerance, if ``fn`` is not equivariant; if
            an output is not finite or has another shape than it should have; or, as "inconclusive", if outputs are
            nearly the same for all inputs, so that their symmetry says nothing.
        ValueError: if there are no inputs and nothing says their shape, ``elements`` is empty, or the number of actions
            is not that of the tensors.
        TypeError: if ``fn`` returns something else.

    >>> from equiflop.groups import cyclic
    >>> def mirrored(g, x):
    ...     return x.flip(-1) if g else x
    >>> assert_equivariant(torch.relu, mirrored, mirrored, range(2), torch.tensor([[1.0, -2.0, 3.0]]))
    >>> assert_equivariant(lambda x: x.amax(-1), mirrored, None, cyclic(2), shape=(2, 5))
    >>> assert_equivariant(lambda x: x.cumsum(-1), mirrored, mirrored, range(2), torch.tensor([[1.0, -2.0, 3.0]]))
    Traceback (most recent call last):
    ...
    AssertionError: not equivariant at element 1: relative error 1.0e+00 of the output, tolerance 1e-05 (float32)
    """
    elements = _all_elements(elements)
    given = _inputs(fn, act_in, inputs, shape, dtype, seed)

    def call(*tensors: Tensor) -> dict[str, Tensor]:
        result = fn(*tensors)
        if isinstance(result, Tensor):
            return {"the output": result}
        if isinstance(result, (tuple, list)) and all(isinstance(part, Tensor) for part in result):
            return {f"output {i}": part for i, part in enumerate(result)}
        raise TypeError(f"fn returned {type(result).__name__}; a tensor, or a tuple or list of tensors, is needed")

    def moved_inputs(a: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _apply(act_in, "act_in", a, tensors)

    def moved_outputs(a: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return dict(zip(values, _apply(act_out, "act_out", a, tuple(values.values())), strict=True))
        except _WrongAxisError as error:
            raise AssertionError(f"not equivariant: the output does not fit act_out: {error}") from None

    with torch.no_grad():
        reference = call(*given)
        for what, value in reference.items():
            if not _finite(value):
                raise AssertionError(f"{what} is not finite, so that nothing can be compared")
        comparisons = list(compare(call, moved_inputs, moved_outputs, elements, given, reference))
        constant = [what for what, value in reference.items() if value.numel()]
        for other in _other_inputs(given, seed):
            if not constant:
                break
            values = call(*other)
            constant = [what for what in constant if what in values and _nearly_equal(values[what], reference[what])]
    coarsest = _coarsest_dtype((*given, *reference.values()))
    limit = tolerance if tolerance is not None else TOLERANCES.get(coarsest, TOLERANCES[torch.float32])
    wrong = [row for row in comparisons if not row.error <= limit]
    if wrong:
        worst = max(wrong, key=lambda row: row.error)
        error = worst.note or f"relative error {worst.error:.1e} of {worst.what}"
        number = str(coarsest).removeprefix("torch.")
        raise AssertionError(
            f"not equivariant at {_element_name(worst.element, act_in, act_out)}: {error}, "
            f"tolerance {limit:.0e} ({number})"
        )
    if constant or not any(value.numel() for value in reference.values()):
        what = constant[0] if constant else "every output"
        reason = "nearly the same for all inputs" if constant else "empty"
        raise AssertionError(f"inconclusive: {what} is {reason}, so that its symmetry says nothing")


def compare(
    call: Callable[..., Mapping[str, Tensor]],
    act_in: Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]],
    act_out: Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]],
    elements: Iterable[int],
    inputs: tuple[Tensor, ...],
    reference: Mapping[str, Tensor],
) -> Iterator[Comparison]:
    """Compare named outputs at moved inputs with moved outputs, for one element after the other.

    Args:
        call: the function, which names its outputs.
        act_in: what an element makes of the inputs.
        act_out: what it makes of the outputs.
        elements: the elements.
        inputs: the inputs.
        reference: ``call(*inputs)``.
    """
    for a in elements:
        found = call(*act_in(a, inputs))
        for what, expected in act_out(a, reference).items():
            if what not in found:
                yield Comparison(a, what, float("inf"), f"{what} is missing for the moved input")
            elif found[what].shape != expected.shape:
                shapes = f"shape {tuple(found[what].shape)} instead of {tuple(expected.shape)}"
                yield Comparison(a, what, float("inf"), f"{what} of the moved input has {shapes}")
            else:
                yield Comparison(a, what, relative_error(found[what], expected))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; infinite where there is no number or another shape."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    found, expected = _wide(found), _wide(expected)
    difference = (found - expected).abs().max()
    if difference == 0:
        return 0.0
    error = difference / expected.abs().max()
    return float(error.nan_to_num(nan=float("inf")))


def _nearly_equal(value: Tensor, other: Tensor) -> bool:
    """Whether two outputs differ by less than ``MIN_SPREAD`` of their size; outputs without a number differ."""
    return value.shape == other.shape and relative_error(value, other) < MIN_SPREAD


class _WrongAxisError(ValueError):
    """A ``Rep`` or ``Action`` that does not fit a tensor's last axis."""


def _apply(act: Any, argument: str, a: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What element ``a`` makes of all tensors."""
    if isinstance(act, (tuple, list)):
        if len(act) != len(tensors):
            raise ValueError(f"{argument} has {len(act)} entries for {len(tensors)} tensors; it needs one for each")
        return tuple(_apply(one, argument, a, (x,))[0] for one, x in zip(act, tensors, strict=True))
    if act is None:
        return tensors
    if isinstance(act, (Rep, Action)):
        try:
            if isinstance(act, ImageGroup):
                return tuple(act.act_on_image(a, x) for x in tensors)
            return tuple(act.act(a, x) for x in tensors)
        except (ValueError, IndexError) as error:
            raise _WrongAxisError(str(error)) from None
    if not callable(act):
        raise TypeError(f"{argument}={act!r} is no function, Rep, Action, ImageGroup or None, nor a tuple of these")
    result = act(a, *tensors)
    moved = (result,) if isinstance(result, Tensor) else tuple(result)
    if len(moved) != len(tensors):
        raise ValueError(f"{argument} returned {len(moved)} tensors for {len(tensors)}; it must return one for each")
    return moved


def _all_elements(elements: Iterable[int] | FiniteGroup | Action) -> list[int]:
    if isinstance(elements, (FiniteGroup, Action)):
        return list(range(elements.order))
    if not isinstance(elements, Iterable):
        raise TypeError(f"elements={elements!r} must be group elements (integers), a FiniteGroup or an Action")
    found = list(elements)
    if not found:
        raise ValueError("elements is empty, so that nothing would be compared; give for example range(group.order)")
    return found


def _inputs(fn: Any, act_in: Any, inputs: Any, shape: Any, dtype: torch.dtype | None, seed: int) -> tuple[Tensor, ...]:
    """The given inputs, or random ones."""
    if inputs is not None:
        if shape is not None or dtype is not None:
            raise ValueError("inputs and shape or dtype exclude each other: the inputs have a shape and a dtype")
        found = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        if not found or not all(isinstance(x, Tensor) for x in found):
            raise ValueError(f"inputs={inputs!r} must be a tensor or a tuple of tensors")
        return found
    generator = torch.Generator().manual_seed(seed)
    parameters = fn.parameters() if isinstance(fn, nn.Module) else iter(())
    like = next((p for p in parameters if p.is_floating_point()), torch.empty(0, dtype=torch.float64, device="cpu"))
    dtype = dtype if dtype is not None else like.dtype
    if shape is None and isinstance(fn, EquivariantModel):
        samples = fn.sample_inputs(2, generator)
    else:
        shapes = _shapes(fn, act_in) if shape is None else _nested(shape)
        samples = tuple(torch.randn(s, generator=generator, dtype=torch.float64, device="cpu") for s in shapes)
    return tuple(x.to(like.device, dtype if x.is_floating_point() else None) for x in samples)


def _nested(shape: Any) -> list[tuple[int, ...]]:
    entries = list(shape)
    if all(isinstance(entry, int) for entry in entries):
        return [tuple(entries)]
    return [tuple(entry) for entry in entries]


def _shapes(fn: Any, act_in: Any) -> list[tuple[int, ...]]:
    """Shapes that follow from what acts on the input."""
    if isinstance(fn, EquivariantLayer):
        return [(2, 5, fn.in_rep.dim)]
    acts = act_in if isinstance(act_in, (tuple, list)) else [act_in]
    if acts and all(isinstance(act, (Rep, Action)) for act in acts):
        return [(2, 3, 12, 12) if isinstance(act, ImageGroup) else (2, 5, act.dim) for act in acts]
    raise ValueError(
        "inputs: give a tensor, a tuple of tensors, or shape=... for random ones; nothing says their shape"
    )


def _other_inputs(inputs: tuple[Tensor, ...], seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Inputs that are different: made of the values of the given ones, of their signs and about their sizes.

    Integers stay as they are, which may be masks or places, unless there are no other inputs.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    continuous = [x.is_floating_point() or x.is_complex() for x in inputs]

    def drawn(x: Tensor) -> Tensor:
        places = torch.randint(x.numel(), x.shape, generator=generator, device="cpu")
        return x.flatten()[places.to(x.device)]

    def scaled(x: Tensor) -> Tensor:
        factors = 0.25 + 1.5 * torch.rand(x.shape, generator=generator, dtype=torch.float64, device="cpu")
        return x * factors.to(x.device, x.dtype)

    def other(x: Tensor, scale: bool, draw: bool) -> Tensor:
        if not x.numel() or (any(continuous) and not scale):
            return x
        x = drawn(x) if draw or not scale else x
        return scaled(x) if scale else x

    for i in range(8):  # outputs that are integers or booleans can be the same by chance
        yield tuple(other(x, scale, draw=i > 0) for x, scale in zip(inputs, continuous, strict=True))


def _coarsest_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    dtypes = [x.dtype.to_real() if x.is_complex() else x.dtype for x in tensors]
    known = [dtype for dtype in dtypes if dtype in TOLERANCES]
    return max(known, key=TOLERANCES.__getitem__, default=torch.float64)


def _element_name(a: int, *acts: Any) -> str:
    """``element 1``, and in brackets what it does where an action says so."""
    name = f"element {a}"
    flat = [one for act in acts for one in (act if isinstance(act, (tuple, list)) else [act])]
    named = (act.element_name(a) for act in flat if isinstance(act, Action))
    words = next((words for words in named if words != name), None)
    return f"{name} ({words})" if words else name


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _wide(value: Tensor) -> Tensor:
    """In double precision, complex numbers as pairs of real ones."""
    return (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).double()
