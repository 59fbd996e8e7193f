"""A product is computed in the way that was chosen for its number of rows, and launched when that says."""

import pytest
import torch
import torch.nn.functional as F

from server.model.fastest import Way
from server.model.forward import ForwardState
from server.model.linear import SiteGroup
from server.model.product import Product
from tests.server.engine.tiny_models import DEVICE
from tests.server.model.test_fastest import aligned, right


def test_a_product_takes_its_choice_for_that_number_of_rows_alone():
    module = torch.nn.Linear(16, 8, bias=False, device=DEVICE)
    product = Product([module])
    weight, calls = aligned(8, 16), []
    product.ways = {4: Way(lambda x, weight: calls.append(x.shape) or F.linear(x, weight))}
    for x in (aligned(4, 16), aligned(1, 4, 16), aligned(3, 16), aligned(5, 16).flatten()[1:65].view(4, 16)):
        assert torch.equal(product.linear(x, weight, None), F.linear(x, weight))
    assert torch.equal(product.linear(aligned(4, 16), weight, aligned(8)).isfinite(), torch.ones(4, 8, dtype=torch.bool, device=DEVICE))
    assert calls == [(4, 16), (1, 4, 16)]


@pytest.mark.parametrize(("num_rows", "is_askew", "first"), [(4, False, True), (5, False, False), (4, True, False)])
def test_a_group_launches_first_what_was_chosen_to_go_first(num_rows, is_askew, first):
    class Deltas:
        def apart(self, x, shape, compute, *, goes_first=False):
            asked.append(goes_first)
            return compute(), x

    asked, group = [], SiteGroup(0, ["up"], [torch.nn.Linear(16, 8, bias=False, device=DEVICE)], [8], ForwardState())
    group._deltas, group.product.ways_beside = Deltas(), {4: Way(right, goes_first=True), 5: Way(right)}
    x = aligned(num_rows + 1, 16).flatten()[is_askew : is_askew + num_rows * 16].view(1, num_rows, 16)
    weight = aligned(8, 16)
    y, _ = group.call_apart(x, weight, None)
    assert asked == [first] and torch.equal(y, F.linear(x, weight))


def test_beside_deltas_a_product_takes_what_is_fastest_there():
    product, weight, calls = Product([torch.nn.Linear(16, 8, bias=False, device=DEVICE)]), aligned(8, 16), []
    for name in ("ways", "ways_beside"):
        setattr(product, name, {4: Way(lambda x, weight, name=name: calls.append(name) or F.linear(x, weight))})
    for shares_card in (False, True):
        for num_rows in (4, 5):
            product.linear(aligned(num_rows, 16), weight, None, shares_card=shares_card)
    assert calls == ["ways", "ways_beside"]
