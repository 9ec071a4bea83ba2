"""Dense: add the products of a few vectors and a matrix, four vectors and sixteen columns at a time in registers.

Loops over rows and columns, which compilers know how to widen, load and store each sum again for every few products,
and ask at each turn whether arrays overlap; for matrices as small as a network's last layers that is most of the time.
What is written here as LLVM's intermediate code numba compiles into the loop that uses it, for any processor.
A matrix lies in strips of as many columns as a tile has, each strip in one piece.
Shapes: K vectors, E numbers in each, H columns, T strips of W columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as _cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from recsys.compiled import compiled_apart

# Vectors and columns of a tile: eight registers of sums, two of the matrix and one of a vector.
VECTORS, COLUMNS = 4, 16
# Numbers that a register holds.
WIDE = 8

# numba describes this module to nobody.
cgutils: Any = _cgutils
_F32, _I32 = ir.FloatType(), ir.IntType(32)
_WIDE = ir.VectorType(_F32, WIDE)

Floats = NDArray[np.float32]


def strips(matrix_EH: Floats) -> Floats:
    """Return a matrix in strips (T, E, W), with columns of noughts at the end where it has none."""
    rows, width = matrix_EH.shape
    found: Floats = np.zeros((rows, -(-width // COLUMNS) * COLUMNS), np.float32)
    found[:, :width] = matrix_EH
    return np.ascontiguousarray(found.reshape(rows, -1, COLUMNS).transpose(1, 0, 2))


@intrinsic
def _add_tile(typing: Any, x_KE: Any, first: Any, map_TEW: Any, strip: Any, found_KH: Any) -> Any:
    """Add the products of VECTORS vectors from `first` on and of a strip; all lie in C order."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def start(number: int) -> tuple[Any, Any]:
            """Return where an array begins and its second size."""
            array = context.make_array(signature.args[number])(context, builder, arguments[number])
            return array.data, builder.extract_value(array.shape, 1)

        def at(place: Any, row: Any, width: Any, column: Any) -> Any:
            return builder.gep(place, [builder.add(builder.mul(row, width), column)])

        def plus(value: Any, more: int) -> Any:
            return builder.add(value, ir.Constant(value.type, more))

        def wide(place: Any) -> Any:
            return builder.bitcast(place, _WIDE.as_pointer())

        (x, numbers), (matrix, _), (found, width) = (start(number) for number in (0, 2, 4))
        first, strip = arguments[1], arguments[3]
        none, columns = ir.Constant(first.type, 0), ir.Constant(first.type, COLUMNS)
        halves = range(0, COLUMNS, WIDE)
        vectors = [at(x, plus(first, each), numbers, none) for each in range(VECTORS)]
        column = builder.mul(strip, columns)
        places = [
            wide(at(found, plus(first, each), width, plus(column, half))) for each in range(VECTORS) for half in halves
        ]
        matrix = at(matrix, strip, builder.mul(numbers, columns), none)
        sums = [cgutils.alloca_once_value(builder, builder.load(place, align=4)) for place in places]
        multiply = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_WIDE, [_WIDE, _WIDE, _WIDE]), f"llvm.fmuladd.v{WIDE}f32"
        )
        with cgutils.for_range(builder, numbers) as loop:
            row = [
                builder.load(wide(at(matrix, loop.index, columns, ir.Constant(columns.type, half))), align=4)
                for half in halves
            ]
            for each, vector in enumerate(vectors):
                one = builder.insert_element(
                    ir.Constant(_WIDE, ir.Undefined), builder.load(builder.gep(vector, [loop.index])), _I32(0)
                )
                factor = builder.shuffle_vector(
                    one, ir.Constant(_WIDE, ir.Undefined), ir.Constant(ir.VectorType(_I32, WIDE), [0] * WIDE)
                )
                for place, half in zip(sums[len(row) * each :], row, strict=False):
                    builder.store(builder.call(multiply, [factor, half, builder.load(place)]), place)
        for place, total in zip(places, sums, strict=True):
            builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    return types.void(x_KE, types.int64, map_TEW, types.int64, found_KH), code


add_tile: Any = _add_tile


@compiled_apart
def add_products(x_KE: Floats, map_TEW: Floats, found_KH: Floats) -> None:
    """Add x @ map to the first columns of `found`; K is a multiple of VECTORS."""
    for strip in range(len(map_TEW)):
        for first in range(0, len(x_KE), VECTORS):
            add_tile(x_KE, first, map_TEW, strip, found_KH)
