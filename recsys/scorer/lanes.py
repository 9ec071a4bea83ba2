"""Lanes: sums of products in whole numbers, of sixteen rows with one or four users at once, in AVX2 or AVX-512 VNNI.

Compilers do not find this by themselves: one instruction multiplies numbers of eight bits, one of each pair without a
sign, and adds the products: AVX2 32 pairs, two by two into sixteen bits, VNNI 64 pairs, four by four to what is in
thirty-two bits already. So rows are raised by ZERO; what this adds to the sums depends on the user alone, and is what
they begin with. numba compiles what is written here as LLVM's intermediate code into the loop that uses it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils as _cgutils
from numba.core import codegen as _codegen
from numba.core import config as _config
from numba.extending import intrinsic

# Rows in a block.
ROWS = 16
# Columns of which a block holds each row's numbers together, as the instruction wants them, and their bytes.
QUAD = 4
QUAD_BYTES = QUAD * ROWS
# What stands for nought in a row.
ZERO = 128
# Bytes that the processor fetches at a time.
LINE = 64
# Users whose products with a block are computed while the block is in registers.
USERS = 4
# Before the weights of each kind of columns stand, user after user, what the sums begin with and what they count.
HEAD = 2

# numba describes these modules to nobody.
cgutils: Any = _cgutils
codegen: Any = _codegen
config: Any = _config


def _has(feature: str) -> bool:
    """Tell whether numba compiles for processors with a feature; NUMBA_CPU_FEATURES can name others than this one's."""
    features = codegen.get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return f"+{feature}" in features.split(",")


# Whether four products are added up at once, in thirty-two bits.
WIDE = _has("avx512vnni")
# Largest weight, and largest sum in one place; whether those that are added up there fit is for whoever makes the
# weights to see to; on the way there sums may go round. In sixteen bits the largest sum of two products is
# (255 + 255) x 64.
LARGEST_WEIGHT, LARGEST_SUM = (127, 1 << 22) if WIDE else (64, 32767)
# How often a unit the sum of one kind of columns may count, or almost twice so often, that the sums of both together
# fit thirty-two bits: of two places for each kind, or of one.
LARGEST_FACTOR = 127 if WIDE else 7500
# What the numbers of columns have that are summed in a second place; nothing where there is one.
SECOND = 0 if WIDE else 2

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BITS = 512 if WIDE else 256
_BYTES, _WORDS, _SUMS = (ir.VectorType(kind, _BITS // kind.width) for kind in (_I8, _I16, _I32))
# Vectors that sixteen rows take.
_VECTORS = ROWS // _SUMS.count
_MULTIPLY_BYTES, _MULTIPLY_WORDS = "llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"
_MULTIPLY_AND_ADD = "llvm.x86.avx512.vpdpbusd.512"


def available() -> bool:
    """Tell whether this processor has the instructions."""
    return _has("avx2")


def _constant(value: int) -> Any:
    return ir.Constant(_I32, value)


def _repeated(builder: Any, value: Any) -> Any:
    """Put one 32-bit number into every place of a vector."""
    one = builder.insert_element(ir.Constant(_SUMS, ir.Undefined), value, _constant(0))
    return builder.shuffle_vector(one, ir.Constant(_SUMS, ir.Undefined), ir.Constant(_SUMS, [0] * _SUMS.count))


class _Tile:
    """Write the code for a number of users."""

    def __init__(self, builder: Any, users: int) -> None:
        self._builder, self._users = builder, users
        self._sums = [[cgutils.alloca_once(builder, _SUMS) for _ in range(_VECTORS)] for _ in range(users)]
        for place in (place for places in self._sums for place in places):
            builder.store(ir.Constant(_SUMS, [0] * _SUMS.count), place)

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self._builder.call(cgutils.get_or_insert_function(self._builder.module, kind, name), arguments)

    def _added(self, before: Any, rows: Any, weights: Any) -> Any:
        """Return sums to which the products of a quad of columns were added."""
        builder = self._builder
        if WIDE:
            quads = (builder.bitcast(each, _SUMS) for each in (rows, weights))
            return self._call(_MULTIPLY_AND_ADD, _SUMS, before, *quads)
        return builder.add(before, self._call(_MULTIPLY_BYTES, _WORDS, rows, weights))

    def _counted(self, sums: Any, factor: Any) -> Any:
        """Return what the sums of one kind of columns count."""
        return self._builder.mul(sums, factor) if WIDE else self._call(_MULTIPLY_WORDS, _SUMS, sums, factor)

    def add(self, block: Any, weights: Any, quads: Any) -> None:
        """Add the products of a block's `quads` with the users' weights, quad after quad and user after user."""
        builder, kind = self._builder, quads.type
        sums = _SUMS if WIDE else _WORDS

        def word(place: Any, vector: Any) -> Any:
            """Put a word of the weights into every place of a vector."""
            return builder.bitcast(_repeated(builder, builder.load(builder.gep(weights, [place]), align=4)), vector)

        places = [[cgutils.alloca_once(builder, sums) for _ in range(_VECTORS)] for _ in range(self._users)]
        for user, of_user in enumerate(places):
            for place in of_user:
                builder.store(word(ir.Constant(kind, user), sums), place)
        with cgutils.for_range(builder, quads) as loop:
            start = builder.mul(loop.index, ir.Constant(kind, QUAD_BYTES))
            rows = [
                builder.load(
                    builder.bitcast(
                        builder.gep(block, [builder.add(start, ir.Constant(kind, first))]), _BYTES.as_pointer()
                    ),
                    align=1,
                )
                for first in range(0, QUAD_BYTES, _BYTES.count)
            ]
            first = builder.mul(builder.add(loop.index, ir.Constant(kind, HEAD)), ir.Constant(kind, self._users))
            for user, of_user in enumerate(places):
                weight = word(builder.add(first, ir.Constant(kind, user)), _BYTES)
                for some, place in zip(rows, of_user, strict=True):
                    builder.store(self._added(builder.load(place), some, weight), place)
        for user, (of_user, totals) in enumerate(zip(places, self._sums, strict=True)):
            factor = word(ir.Constant(kind, self._users + user), sums)
            for place, total in zip(of_user, totals, strict=True):
                builder.store(builder.add(builder.load(total), self._counted(builder.load(place), factor)), total)

    def finish(self, limits: Any, out: Any) -> Any:
        """Store the sums and return a bit for each that is above its user's limit."""
        builder = self._builder
        mask = ir.Constant(_I64, 0)
        for user, totals in enumerate(self._sums):
            limit = _repeated(builder, builder.load(builder.gep(limits, [_constant(user)]), align=4))
            for number, place in enumerate(totals):
                first = ROWS * user + _SUMS.count * number
                total = builder.load(place)
                target = builder.bitcast(builder.gep(out, [_constant(first)]), _SUMS.as_pointer())
                builder.store(total, target, align=4)
                bits = builder.bitcast(builder.icmp_signed(">", total, limit), ir.IntType(_SUMS.count))
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
            quads = [builder.udiv(size, ir.Constant(size.type, QUAD_BYTES)) for size in (first_bytes, second_bytes)]
            kind = quads[0].type
            written = _Tile(builder, users)
            written.add(first, weights, quads[0])
            after = builder.mul(builder.add(quads[0], ir.Constant(kind, HEAD)), ir.Constant(kind, users))
            written.add(second, builder.gep(weights, [after]), quads[1])
            return written.finish(limits_at, sums_at)

        return signature, code

    return intrinsic(products)


# Both take the blocks of vectors and those of standings (G, uint8, quads of ROWS rows) and which block; the weights of
# the users in tiles (T, int32: of the vectors and then of the standings the HEAD and quad after quad, user after user
# within each) and which tile; the limits of the users (T, U); and which row of an array the sums go to (int32, user
# after user). They return a bit for each sum above the limit of its user, the lowest that of the first user's first
# row. All lie in C order. To take rows of arrays out here rather than there would count references to them at every
# turn.
products_of_one = _products(1)
products_of_four = _products(USERS)


@intrinsic
def _trailing_zeros(typing: Any, value: Any) -> Any:
    """Return the number of the lowest bit that is set; one must be."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), code


trailing_zeros: Any = _trailing_zeros


@intrinsic
def _prefetch(typing: Any, rows: Any, row: Any) -> Any:
    """Have the processor fetch a row of a two-dimensional array that will be looked at soon."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        kind = arguments[1].type
        width = builder.mul(builder.extract_value(array.shape, 1), array.itemsize)
        start = builder.gep(builder.bitcast(array.data, _I8.as_pointer()), [builder.mul(arguments[1], width)])
        fetch = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]),
            "llvm.prefetch.p0",
        )
        lines = builder.udiv(builder.add(width, ir.Constant(kind, LINE - 1)), ir.Constant(kind, LINE))
        with cgutils.for_range(builder, lines) as loop:
            place = builder.gep(start, [builder.mul(loop.index, ir.Constant(kind, LINE))])
            # To be read, kept in all caches, of data.
            builder.call(fetch, [place, _constant(0), _constant(3), _constant(1)])
        return context.get_dummy_value()

    return types.void(rows, types.int64), code


prefetch: Any = _prefetch
