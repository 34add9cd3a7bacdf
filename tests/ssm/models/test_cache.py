"""The cache: its size, its rows, and whose it is."""

import copy
import io
import itertools
from collections.abc import Callable

import pytest
import torch
from torch.utils import _pytree as pytree

from ssm._errors import ArgumentError
from ssm.models.cache import MambaCache
from ssm.models.hybrids import JambaModel
from ssm.models.patterns import NAMED_PATTERNS
from tests.ssm.helpers import assert_close
from tests.ssm.models.helpers import LETTERS, tiny, tokens

FIXED = ["mamba", "mamba2", "s4", "s4d", "s5", "rwkv", LETTERS]


def sizes(pattern: str, steps: int) -> list[list[int]]:
    """The bytes of each layer before the first of ``steps`` steps and after each."""
    model = tiny(pattern)
    cache, found = model.init_state(3), []
    with torch.no_grad():
        for _ in range(steps):
            found.append(cache.layer_bytes)
            _, cache = model.step(tokens(3), cache)
    found.append(cache.layer_bytes)
    assert cache.bytes == sum(found[-1])
    return found


@pytest.mark.parametrize("pattern", FIXED)
def test_state_space_models_have_caches_of_one_size(pattern: str) -> None:
    found = sizes(pattern, 4)
    assert found == [found[0]] * 5
    assert min(found[0]) > 0


def test_attention_grows_by_its_keys_and_values() -> None:
    per_step = 3 * 2 * 8 * 8  # rows, key and value, channels, bytes of float64
    lengths = 3 * 8  # one int64 a row
    for layer in range(2):
        found = [entry[layer] for entry in sizes("transformer", 4)]
        assert found == [lengths + i * per_step for i in range(5)]


def test_hyena_grows_and_its_neighbours_do_not() -> None:
    found = sizes("HM", 4)
    hyena = [entry[0] for entry in found]
    assert {b - a for a, b in itertools.pairwise(hyena)} == {3 * 2 * 8 * 8}
    assert len({entry[1] for entry in found}) == 1


@pytest.mark.parametrize("pattern", NAMED_PATTERNS)
def test_chosen_rows_go_on_as_they_were(pattern: str) -> None:
    model, x, follow = tiny(pattern), tokens(3, 5), tokens(3, 2, seed=2)
    with torch.no_grad():
        cache = model(x, lengths=torch.tensor([5, 3, 4])).state
        expected = model(follow, cache).logits
        for rows in ([2, 0], [1, 1, -1], torch.tensor([0])):
            part = cache.select(rows)
            assert part.batch_size == len(rows)
            assert_close(model(follow[rows], part).logits, expected[rows])
    for bad in ([3], [[0]]):
        with pytest.raises(ArgumentError, match="rows"):
            cache.select(bad)


def test_a_model_leaves_the_cache_that_it_is_given() -> None:
    model = tiny("jamba")
    with torch.no_grad():
        cache = model(tokens(2, 3)).state
    before = copy.deepcopy(cache.states)
    model.step(tokens(2), cache)
    model(tokens(2, 2), cache)
    pairs = zip(
        pytree.tree_leaves(before), pytree.tree_leaves(cache.states), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_cache_of_another_model_or_batch_is_refused() -> None:
    model, x = tiny("mamba"), tokens(2, 3)
    twin, other = tiny("mamba"), tiny("mamba2")
    for foreign in (twin, other):
        cache = foreign.init_state(2)
        calls: list[Callable[[], object]] = [
            lambda cache=cache: model(x, cache),
            lambda cache=cache: model.step(x[:, 0], cache),
        ]
        for call in calls:
            with pytest.raises(ArgumentError, match="another model"):
                call()
    with pytest.raises(ArgumentError, match="3 rows"):
        model(x, model.init_state(3))
    with pytest.raises(ArgumentError, match="1 rows"):
        model.step(x[:, 0], model.init_state(1))


def test_copies_share_caches_and_reloaded_ones_are_bound_anew() -> None:
    model, x = tiny("MA"), tokens(2, 3)
    with torch.no_grad():
        cache = model(x).state
        expected = model(x, cache).logits
        assert torch.equal(copy.deepcopy(model)(x, cache).logits, expected)
        file = io.BytesIO()
        torch.save(cache.states, file)
        file.seek(0)
        again = tiny("MA")
        kept = again.init_state(2).replaced(torch.load(file, weights_only=False), 2)
        assert torch.equal(again(x, kept).logits, expected)
        assert torch.equal(again(x, cache.rebind(again)).logits, expected)
    with pytest.raises(ArgumentError, match="cache"):
        cache.rebind(tiny("MA", n_layers=3))
    with pytest.raises(ArgumentError, match="new_state"):
        cache.rebind(tiny("AM"))


def test_the_chapters_cache_by_hand() -> None:
    model = JambaModel(8, num_layers=8, dtype=torch.float64)
    assert isinstance(model.init_state(2), MambaCache)
    cache = MambaCache(model, 2)
    assert len(cache.states) == 8
    x, inputs = torch.randn(2, 4, 8, dtype=torch.float64), []
    for x_t in x.unbind(1):
        h = x_t
        for i, layer in enumerate(model.layers):
            h, new = layer.step(h, cache.get(i))
            cache.update(i, new)
        inputs.append(h)
    assert_close(torch.stack(inputs, 1), model(x).y)


def test_states_that_do_not_fit_are_refused() -> None:
    model = tiny("MA")
    cache, good = model.init_state(2), model(tokens(2, 3)).state
    cache.update(1, good.get(1))  # longer than before: attention's grow
    with pytest.raises(ArgumentError, match="new_state"):
        cache.update(0, good.get(1))
    with pytest.raises(ArgumentError, match="state"):
        cache.update(0, model.init_state(3).get(0))
    wider = tiny("MA", d_model=10).init_state(2)
    for i in range(2):
        with pytest.raises(ArgumentError, match="new_state"):
            cache.update(i, wider.get(i))
    for index in (2, -1):
        with pytest.raises(ArgumentError, match="layer_idx"):
            cache.get(index)
    with pytest.raises(ArgumentError, match="batch_size"):
        MambaCache(model, -1)
    with pytest.raises(ArgumentError, match="without layers"):
        MambaCache(torch.nn.Linear(1, 1), 1)
