"""The loop over histories mixes what plain attention mixes, and its gradients are autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recsys import last_place

LENGTH, DIMENSION, HEADS = 5, 6, 3
ITEMS, CLASSES, GAPS = 7, 4, 3

Tables = tuple[Tensor, Tensor, Tensor, Tensor]


def _plain(q_BHD: Tensor, tables: Tables, places: tuple[Tensor, Tensor, Tensor], filled_BL: Tensor) -> Tensor:
    vectors, position, classes, gaps = tables
    x_BLD = vectors[places[0]] + position[-filled_BL.shape[1] :] + classes[places[1]] + gaps[places[2]]
    logits_BHL = torch.einsum("bhd,bld->bhl", q_BHD, x_BLD).masked_fill(~filled_BL[:, None], -1e9)
    return torch.einsum("bhl,bld->bhd", logits_BHL.softmax(2), x_BLD)


@pytest.mark.parametrize("length", [LENGTH, LENGTH - 2])
@pytest.mark.parametrize("filled", ["some", "none of one", "last alone"])
def test_values_and_gradients_are_those_of_plain_attention(length: int, filled: str) -> None:
    draw = torch.Generator().manual_seed(length)
    sizes = (ITEMS, LENGTH, CLASSES, GAPS)
    # Items, classes and gaps repeat, within a history and between histories.
    places = tuple(torch.randint(size, (9, length), generator=draw) for size in (ITEMS, CLASSES, GAPS))
    assert len(places) == 3
    filled_BL = torch.rand(9, length, generator=draw) < 0.6
    if filled == "none of one":
        filled_BL[4] = False
    elif filled == "last alone":
        filled_BL[:, :-1], filled_BL[:, -1] = False, True
    weight_BHD = torch.randn(9, HEADS, DIMENSION, generator=draw)
    q_BHD = torch.randn(9, HEADS, DIMENSION, generator=draw)
    drawn = [torch.randn(size, DIMENSION, generator=draw) for size in sizes]
    found = []
    for mix in (last_place.mix, _plain):
        asked, vectors, position, classes, gaps = (each.clone().requires_grad_() for each in (q_BHD, *drawn))
        mixed_BHD = mix(asked, (vectors, position[-length:], classes, gaps), places, filled_BL)
        (mixed_BHD * weight_BHD).sum().backward()
        found.append([mixed_BHD.detach(), *(each.grad for each in (asked, vectors, position, classes, gaps))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert all(float(each.abs().max()) > 0.01 for each in found[0][2:])


def test_what_is_not_finite_stays_so() -> None:
    q_BHD, vectors = torch.ones(1, 1, 2), torch.tensor([[0.0, 1.0], [float("nan"), 0.0]])
    tables = vectors, torch.zeros(2, 2), torch.zeros(1, 2), torch.zeros(1, 2)
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    filled_BL = torch.ones(1, 2, dtype=torch.bool)
    assert not torch.isfinite(last_place.mix(q_BHD, tables, (torch.tensor([[0, 1]]), zeros, zeros), filled_BL)).all()
