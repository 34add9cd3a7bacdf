"""Group axioms, the structure that theory gives A5, and the published numbering."""

from collections import Counter

import numpy as np
import pytest

from data_dir.groups import MOST_ELEMENTS, group
from experiments.common import InputError

ORDERS = {
    "Z1": 1,
    "S1": 1,
    "A1": 1,
    "A2": 1,
    "S2": 2,
    "Z7": 7,
    "S3": 6,
    "A4": 12,
    "S4": 24,
    "A5": 60,
    "S3xZ2": 12,
    "A4xZ5": 60,
    "Z2xS3xZ3": 36,
}


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_the_axioms_hold_for_all_triples_and_element_0_is_the_identity(name, order):
    g = group(name)
    table = g.table
    every = np.arange(order)
    assert g.order == len(set(g.elements)) == order
    assert table.shape == (order, order)
    assert np.array_equal(np.sort(table, axis=1), np.tile(every, (order, 1)))  # closed
    assert np.array_equal(table[0], every)
    assert np.array_equal(table[:, 0], every)
    assert not table[every, g.inverses].any()
    assert not table[g.inverses, every].any()
    left = table[table]  # [i, j, k] = (g_i g_j) g_k
    right = table[every[:, None, None], table[None]]  # g_i (g_j g_k)
    assert np.array_equal(left, right)


@pytest.mark.parametrize("name", ["S6", "A6"])
def test_the_axioms_hold_for_random_triples_of_large_groups(name):
    g = group(name)
    i, j, k = np.random.default_rng(0).integers(0, g.order, (3, 20_000))
    assert np.array_equal(g.table[g.table[i, j], k], g.table[i, g.table[j, k]])
    assert not g.table[np.arange(g.order), g.inverses].any()


def order_of(g, i: int) -> int:
    power, n = i, 1
    while power:
        power, n = int(g.table[power, i]), n + 1
    return n


def test_a5_has_the_element_orders_and_conjugacy_classes_of_the_simple_group_of_60():
    g = group("A5")
    assert Counter(order_of(g, i) for i in range(60)) == {1: 1, 2: 15, 3: 20, 5: 24}
    every = np.arange(60)
    conjugates = g.table[g.table, g.inverses[:, None]]  # [h, i] = h g_i h^-1
    classes = {frozenset(conjugates[:, i].tolist()) for i in every}
    assert sorted(map(len, classes)) == [1, 12, 12, 15, 20]


def commutators(name: str) -> set[int]:
    g = group(name)
    products = g.table[g.table, g.inverses[g.table.T]]  # a b (b a)^-1
    return set(products.ravel().tolist())


def test_every_element_of_a5_is_a_commutator_but_s3_and_a4_are_solvable():
    assert len(commutators("A5")) == 60  # so no abelian quotient: not solvable
    assert len(commutators("S3")) == 3
    assert len(commutators("A4")) == 4
    assert commutators("Z7") == {0}


def test_permutations_stand_in_lexicographic_order_and_multiply_as_functions():
    for name in ("S4", "A5"):
        g = group(name)
        parts = [element[0] for element in g.elements]
        assert parts == sorted(parts)
        for i, p in enumerate(parts[::7]):
            for j, q in enumerate(parts):
                composed = tuple(p[q[k]] for k in range(len(q)))
                assert parts[g.table[7 * i, j]] == composed


def test_products_multiply_factor_by_factor_and_count_the_last_factor_fastest():
    g, left, right = group("S3xZ4"), group("S3"), group("Z4")
    for i, j in np.ndindex(24, 24):
        first = left.table[i // 4, j // 4]
        second = right.table[i % 4, j % 4]
        assert g.table[i, j] == 4 * first + second
    assert g.elements[5] == ((0, 2, 1), 1)
    assert max(order_of(group("Z4xZ9"), i) for i in range(36)) == 36  # coprime: cyclic
    assert max(order_of(group("Z6xZ6"), i) for i in range(36)) == 6


def test_the_table_of_a_group_is_one_that_no_caller_can_change():
    assert group("A5") is group("A5")
    with pytest.raises(ValueError, match="read-only"):
        group("A5").table[0, 0] = 1


@pytest.mark.parametrize(
    "name",
    [
        *("", "A", "5", "a5", "Q8", "A5 ", "A5\n", "A0", "Z05", "S-3", "A5x", "xZ2"),
        *("A5_x_Z2", "A5*Z2", "S3 x Z2", "Z1000", "S٣"),
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(InputError, match="expected S, A or Z and a number") as caught:
        group(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["S7", "S999", "A7", "Z999xZ2", "A5xA5"])
def test_groups_too_large_for_a_table_are_refused_at_once(name):
    with pytest.raises(InputError, match="at most 1,000 elements"):
        group(name)


def test_the_largest_groups_are_built():
    assert group("S6").order == 720
    assert group("Z999").order <= MOST_ELEMENTS
