"""Where a program uses a parameter, read from the program itself.

A parameter that is multiplied once, convolved with once or looked up in once
has a gradient that is known from what went in (a) and the cotangent of what
came out (d); a parameter that is used twice, or in any other way, does not.
The program says which: names and types of layers are not asked.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.core import eval_jaxpr
from jax.extend import core

from fmeta.types import Array

# Equation numbers, from the outer program into the calls.
Path = tuple[int, ...]

_CALLS = ('jit', 'pjit', 'closed_call', 'checkpoint', 'remat2')
# Operations on a parameter alone that only rename its entries.
_VIEWS = ('reshape', 'transpose', 'squeeze', 'copy', 'convert_element_type')


class Use(NamedTuple):
  """The only use that a program makes of a parameter.

  Attributes:
    path: of the equation.
    equation: in which the parameter, or a view of it, is an operand.
    place: which operand.
    views: equations that make the operand from the parameter.
  """

  path: Path
  equation: Any
  place: int
  views: tuple[Any, ...] = ()

  @property
  def kind(self) -> str:
    """Name of the primitive."""
    return self.equation.primitive.name

  @property
  def other(self) -> int:
    """Place of the operand that meets the parameter."""
    return 1 - self.place

  def back(self, values: Array, shape: Sequence[int]) -> Array:
    """Values in the operand's shape, moved to where the parameter has them."""

    def view(leaf):
      for equation in self.views:
        # A change of type moves nothing, and would round.
        if equation.primitive.name != 'convert_element_type':
          leaf = equation.primitive.bind(leaf, **equation.params)
      return leaf

    like = jax.ShapeDtypeStruct(tuple(shape), values.dtype)
    return jax.linear_transpose(view, like)(values)[0]


def called(equation: Any) -> tuple[core.Jaxpr, Sequence[Any]] | None:
  """Program and constants of a call; None if the equation is none."""
  if equation.primitive.name not in _CALLS:
    return None
  inner = equation.params['jaxpr']
  if isinstance(inner, core.ClosedJaxpr):
    return inner.jaxpr, inner.consts
  return inner, ()


def only_use(
  jaxpr: core.Jaxpr,
  variable: Any,
  *,
  at: Path = (),
  views: tuple[Any, ...] = (),
  through: Sequence[str] = _VIEWS,
) -> Use | None:
  """The one equation that uses a variable, or None if there are more.

  Calls are entered; a loop that takes the variable is its use.

  Args:
    jaxpr: the program.
    variable: one of its inputs or results.
    at: path of the program.
    views: what has made `variable` of the parameter.
    through: operations whose result is followed instead.
  """
  found = [
    (number, place)
    for number, equation in enumerate(jaxpr.eqns)
    for place, atom in enumerate(equation.invars)
    if atom is variable
  ]
  if len(found) != 1 or any(atom is variable for atom in jaxpr.outvars):
    return None
  number, place = found[0]
  equation, path = jaxpr.eqns[number], (*at, number)
  inner = called(equation)
  if inner is not None:
    entry = inner[0].invars[place]
    return only_use(inner[0], entry, at=path, views=views, through=through)
  if equation.primitive.name in through:
    made, views = equation.outvars[0], (*views, equation)
    return only_use(jaxpr, made, at=at, views=views, through=through)
  return Use(path, equation, place, views)


def run(
  jaxpr: core.Jaxpr,
  consts: Sequence[Any],
  args: Sequence[Any],
  shifts: dict[Path, Array],
  others: dict[Path, int],
  at: Path = (),
) -> tuple[list[Any], dict[Path, Array]]:
  """Runs a program, adds shifts to some results and notes what went in.

  Calls with such an equation inside are run in line; a `checkpoint` among
  them keeps its values.

  Args:
    jaxpr: the program.
    consts: its constants.
    args: its inputs.
    shifts: path of an equation -> what is added to its result.
    others: path of an equation -> which operand to note.
    at: path of the program.

  Returns:
    The outputs, and path -> the operand noted.
  """
  known = dict(zip(jaxpr.constvars, consts, strict=True))
  known.update(zip(jaxpr.invars, args, strict=True))
  noted = {}
  for number, equation in enumerate(jaxpr.eqns):
    path = (*at, number)
    given = [
      atom.val if isinstance(atom, core.Literal) else known[atom]
      for atom in equation.invars
    ]
    inner = called(equation)
    if inner and any(deep[: len(path)] == path for deep in shifts):
      made, deeper = run(*inner, given, shifts, others, path)
      noted |= deeper
    else:
      made = _evaluate(jaxpr, equation, given)
    if path in shifts:
      made, noted[path] = [made[0] + shifts[path]], given[others[path]]
    known.update(zip(equation.outvars, made, strict=True))
  outputs = [
    atom.val if isinstance(atom, core.Literal) else known[atom]
    for atom in jaxpr.outvars
  ]
  return outputs, noted


def _evaluate(
  jaxpr: core.Jaxpr, equation: Any, given: Sequence[Any]
) -> list[Any]:
  """Runs one equation, by jax's own evaluation of a program of just it."""
  inputs = {
    atom: value
    for atom, value in zip(equation.invars, given, strict=True)
    if not isinstance(atom, core.Literal)
  }
  only = jaxpr.replace(
    constvars=[], invars=[*inputs], outvars=equation.outvars, eqns=[equation]
  )
  return list(eval_jaxpr(only, (), *inputs.values()))
