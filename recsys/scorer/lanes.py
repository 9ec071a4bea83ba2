"""Lanes: sums of products in whole numbers, of sixteen rows with one or four users at once, in AVX2.

Compilers do not find this by themselves: one instruction multiplies sixteen pairs of 16-bit numbers and adds them two
by two. numba compiles what is written here as LLVM's intermediate code into the loop that uses it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils as _cgutils
from numba.extending import intrinsic

# Rows in a block.
ROWS = 16
# A block holds two numbers of each of its rows together, as the instruction wants them.
PAIR_BYTES = 2 * ROWS
# Users whose products with a block are computed while the block is in registers.
USERS = 4

# numba describes this module to nobody.
cgutils: Any = _cgutils
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES, _WORDS = ir.VectorType(_I8, PAIR_BYTES), ir.VectorType(_I16, PAIR_BYTES)
_HALF_WORDS, _SUMS = ir.VectorType(_I16, ROWS), ir.VectorType(_I32, ROWS // 2)
_MULTIPLY_AND_ADD = "llvm.x86.avx2.pmadd.wd"


def available() -> bool:
    """Tell whether this processor has the instruction."""
    return bool(binding.get_host_cpu_features().get("avx2", False))


def _constant(value: int) -> Any:
    return ir.Constant(_I32, value)


def _repeated(builder: Any, value: Any) -> Any:
    """Put one 32-bit number into every place of a vector."""
    one = builder.insert_element(ir.Constant(_SUMS, ir.Undefined), value, _constant(0))
    return builder.shuffle_vector(one, ir.Constant(_SUMS, ir.Undefined), ir.Constant(_SUMS, [0] * (ROWS // 2)))


class _Tile:
    """Write the code for a number of users."""

    def __init__(self, builder: Any, users: int) -> None:
        self._builder, self._users = builder, users
        self._multiply_and_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_SUMS, [_HALF_WORDS, _HALF_WORDS]), _MULTIPLY_AND_ADD
        )
        zero = ir.Constant(_SUMS, [0] * (ROWS // 2))
        self._sums = [[cgutils.alloca_once(builder, _SUMS) for _ in range(2)] for _ in range(users)]
        for place in (place for halves in self._sums for place in halves):
            builder.store(zero, place)

    def add(self, block: Any, weights: Any, pairs: Any) -> None:
        """Add the products of a block's `pairs` with the users' weights, pair after pair and user after user."""
        builder = self._builder
        with cgutils.for_range(builder, pairs) as loop:
            kind = loop.index.type
            start = builder.gep(block, [builder.mul(loop.index, ir.Constant(kind, PAIR_BYTES))])
            words = builder.sext(builder.load(builder.bitcast(start, _BYTES.as_pointer()), align=1), _WORDS)
            halves = [
                builder.shuffle_vector(
                    words,
                    ir.Constant(_WORDS, ir.Undefined),
                    ir.Constant(ir.VectorType(_I32, ROWS), list(range(first, first + ROWS))),
                )
                for first in (0, ROWS)
            ]
            first_user = builder.mul(loop.index, ir.Constant(kind, self._users))
            for user, sums in enumerate(self._sums):
                place = builder.gep(weights, [builder.add(first_user, ir.Constant(kind, user))])
                weight = builder.bitcast(_repeated(builder, builder.load(place, align=4)), _HALF_WORDS)
                for half, total in zip(halves, sums, strict=True):
                    product = builder.call(self._multiply_and_add, [half, weight])
                    builder.store(builder.add(builder.load(total), product), total)

    def finish(self, limits: Any, out: Any) -> Any:
        """Store the sums and return a bit for each that is above its user's limit."""
        builder = self._builder
        mask = ir.Constant(_I64, 0)
        for user, halves in enumerate(self._sums):
            limit = _repeated(builder, builder.load(builder.gep(limits, [_constant(user)]), align=4))
            for half, place in enumerate(halves):
                first = ROWS * user + ROWS // 2 * half
                total = builder.load(place)
                target = builder.bitcast(builder.gep(out, [_constant(first)]), _SUMS.as_pointer())
                builder.store(total, target, align=4)
                bits = builder.bitcast(builder.icmp_signed(">", total, limit), _I8)
                mask = builder.or_(mask, builder.shl(builder.zext(bits, _I64), ir.Constant(_I64, first)))
        return mask


def _products(users: int) -> Any:
    """Make the function for a number of users, which must be known when it is compiled."""

    def products(
        typing: Any, vectors: Any, standing: Any, block: Any, words: Any, tile: Any, limits: Any, sums: Any, at: Any
    ) -> Any:
        signature = types.uint64(vectors, standing, block, words, tile, limits, sums, at)

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def start(number: int, row: Any, item: Any) -> tuple[Any, Any]:
                """Return where a row of a two-dimensional array begins, and how many items it has."""
                array = context.make_array(signature.args[number])(context, builder, arguments[number])
                width = builder.extract_value(array.shape, 1)
                data = builder.bitcast(array.data, item.as_pointer())
                return builder.gep(data, [builder.mul(row, width)]), width

            block, tile = arguments[2], arguments[4]
            first, first_bytes = start(0, block, _I8)
            second, second_bytes = start(1, block, _I8)
            weights, _ = start(3, tile, _I32)
            limits_at, _ = start(5, tile, _I32)
            sums_at, _ = start(6, arguments[7], _I32)
            pairs = [builder.udiv(size, ir.Constant(size.type, PAIR_BYTES)) for size in (first_bytes, second_bytes)]
            written = _Tile(builder, users)
            written.add(first, weights, pairs[0])
            after = builder.mul(pairs[0], ir.Constant(pairs[0].type, users))
            written.add(second, builder.gep(weights, [after]), pairs[1])
            return written.finish(limits_at, sums_at)

        return signature, code

    return intrinsic(products)


# Both take the blocks of vectors and those of standings (G, int8, pairs of ROWS rows) and which block; the weights of
# the users in tiles (T, int32, two 16-bit numbers each: pair after pair, and user after user within) and which tile;
# the limits of the users (T, U); and which row of an array the sums go to (int32, user after user). They return a bit
# for each sum above the limit of its user, the lowest that of the first user's first row. All lie in C order. To take
# rows of arrays out here rather than there would count references to them at every turn.
products_of_one = _products(1)
products_of_four = _products(USERS)


@intrinsic
def _trailing_zeros(typing: Any, value: Any) -> Any:
    """Return the number of the lowest bit that is set; one must be."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), code


trailing_zeros: Any = _trailing_zeros
