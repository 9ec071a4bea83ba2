"""Products of a few vectors and a matrix in tiles."""

from __future__ import annotations

import numpy as np
import pytest

from recsys.scorer.dense import COLUMNS, VECTORS, add_products, strips


@pytest.mark.parametrize("vectors", [VECTORS, 3 * VECTORS])
@pytest.mark.parametrize("numbers", [1, 2, 78])
@pytest.mark.parametrize("width", [1, COLUMNS, 3 * COLUMNS + 5])
def test_products_are_added_to_what_is_there(vectors: int, numbers: int, width: int) -> None:
    draw = np.random.default_rng(vectors + numbers + width)
    x, matrix = (draw.standard_normal(shape, np.float32) for shape in ((vectors, numbers), (numbers, width)))
    tiles = strips(matrix)
    assert tiles.shape == (-(-width // COLUMNS), numbers, COLUMNS)
    # Columns behind those of the matrix' strips are somebody else's.
    before = draw.standard_normal((vectors, len(tiles) * COLUMNS + 3), np.float32)
    found = before.copy()
    add_products(x, tiles, found)
    assert np.allclose(found[:, :width], before[:, :width] + x @ matrix, atol=1e-5)
    assert np.array_equal(found[:, width:], before[:, width:])


def test_a_vector_has_the_same_products_beside_any_others() -> None:
    draw = np.random.default_rng(0)
    x, matrix = draw.standard_normal((2 * VECTORS, 70), np.float32), draw.standard_normal((70, COLUMNS), np.float32)
    tiles = strips(matrix)
    together = np.zeros((2 * VECTORS, COLUMNS), np.float32)
    add_products(x, tiles, together)
    for vector in range(2 * VECTORS):
        for place in range(VECTORS):
            few, found = draw.standard_normal((VECTORS, 70), np.float32), np.zeros((VECTORS, COLUMNS), np.float32)
            few[place] = x[vector]
            add_products(few, tiles, found)
            assert np.array_equal(found[place], together[vector])
