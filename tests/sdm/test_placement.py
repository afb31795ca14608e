"""Placements against every choice there is, and row splits against the Lagrangian."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.sdm import knapsack, placement
from jaxeff.sdm.demand import HitCurve, TableNeed
from jaxeff.sdm.knapsack import Option, OverBudget
from jaxeff.sdm.placement import place, split_rows

TABLES = (
    TableNeed("user", rows=1000, row_bytes=100, pooling=50, hit_rate=0.8),
    TableNeed("item", rows=100, row_bytes=100, pooling=2, batch_items=100, hit_rate=0.5),
    TableNeed("rare", rows=5000, row_bytes=100, pooling=1),
)


def options(draw):
    sizes, reads = st.integers(0, 30), st.integers(0, 40)
    return [Option("any", float(draw(sizes)), float(draw(reads))) for _ in range(draw(st.integers(1, 4)))]


@st.composite
def problems(draw):
    menus = [options(draw) for _ in range(draw(st.integers(1, 5)))]
    least = sum(min(one.bytes for one in menu) for menu in menus)
    return menus, least + draw(st.integers(0, 60))


def best(menus, budget):
    """Fewest reads of all choices that fit."""
    fitting = (one for one in itertools.product(*menus) if sum(option.bytes for option in one) <= budget)
    return min(sum(option.reads for option in one) for one in fitting)


def start(menus):
    """Reads where every menu has its smallest option."""
    return sum(min(menu, key=lambda one: (one.bytes, one.reads)).reads for menu in menus)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_exact_is_the_best_of_all_choices(problem):
    menus, budget = problem
    chosen = knapsack.exact(menus, budget)
    assert sum(option.bytes for option in chosen) <= budget
    assert all(option in menu for option, menu in zip(chosen, menus, strict=True))
    assert sum(option.reads for option in chosen) == pytest.approx(best(menus, budget))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_greedy_saves_at_least_half_of_what_can_be_saved(problem):
    menus, budget = problem
    chosen = knapsack.greedy(menus, budget)
    assert sum(option.bytes for option in chosen) <= budget
    assert all(option in menu for option, menu in zip(chosen, menus, strict=True))
    saved = start(menus) - sum(option.reads for option in chosen)
    assert saved >= 0.5 * (start(menus) - best(menus, budget)) - 1e-9


def test_greedy_alone_would_take_the_crumb_and_leave_the_loaf():
    menus = [[Option("a", 0, 1.1), Option("b", 1, 0)], [Option("a", 0, 50), Option("b", 50, 0)]]
    assert knapsack.greedy(menus, 50) == (menus[0][0], menus[1][1])


def test_exact_of_many_tables_is_between_greedy_and_the_relaxation():
    rng = np.random.default_rng(0)
    menus = [
        [Option("direct", 0.0, read), Option("memory", size, 0.0)]
        for size, read in zip(rng.lognormal(3, 1.5, 200), rng.lognormal(2, 1, 200), strict=True)
    ]
    total = sum(menu[1].bytes for menu in menus)
    by_density = sorted(menus, key=lambda menu: -menu[0].reads / menu[1].bytes)
    for share in (0.1, 0.5):
        left, bound = share * total, sum(menu[0].reads for menu in menus)
        for menu in by_density:
            part = min(1.0, left / menu[1].bytes)
            left, bound = left - part * menu[1].bytes, bound - part * menu[0].reads
        greedy, exact = (
            sum(o.reads for o in solve(menus, share * total)) for solve in (knapsack.greedy, knapsack.exact)
        )
        assert bound - 1e-9 <= exact <= greedy + 1e-9
        assert greedy <= 1.02 * exact


def test_exact_refuses_to_take_too_much_memory():
    rng = np.random.default_rng(0)
    # Sizes equal to reads: no table is better than another, which is what knapsacks are hardest at.
    menus = [[Option("a", 0.0, size), Option("b", size, 0.0)] for size in rng.uniform(1, 2, 40)]
    with pytest.raises(ValueError, match="more than max_states=64: take the greedy one"):
        knapsack.exact(menus, 30.0, max_states=64)


def test_densest_tables_go_to_memory():
    found = place(TABLES, 20_000)
    assert found.tiers == {"user": "cached", "item": "memory", "rare": "direct"}
    assert found.memory_bytes == 10_000 and found.reads == pytest.approx(50 * 0.2 + 1)
    assert [(table.name, table.hit_rate) for table in found.slow] == [("user", pytest.approx(0.8)), ("rare", 0)]
    assert found.slow_bytes == 600_000
    assert place(TABLES, 10**9).reads == 0 and place(TABLES, 10**9).slow == ()


def test_dense_parameters_maps_and_the_cache_have_theirs_first():
    tables = [dataclasses.replace(table, map_bytes=1000) for table in TABLES]
    found = place(tables, 20_000, dense_bytes=3000, cache_bytes=5000)
    assert found.other_bytes == 11_000 and found.tiers["item"] == "cached"
    assert place(tables, 21_000, dense_bytes=3000, cache_bytes=5000).tiers["item"] == "memory"


def test_fixed_tiers_hold():
    found = place(TABLES, 200_000, fixed={"item": "direct", "user": "memory", "rare": "cached"}, method="exact")
    assert found.tiers == {"user": "memory", "item": "direct", "rare": "cached"}
    assert found.reads == 201


def test_a_table_below_the_bypass_is_not_cached():
    assert place(TABLES, 0, bypass=0.5).tiers == {"user": "cached", "item": "direct", "rare": "direct"}


@pytest.mark.parametrize("method", ["greedy", "exact"])
def test_caches_of_their_own_are_shared_out_by_their_curves(method):
    steep = HitCurve(np.array([1000.0, 2000.0]), np.array([0.9, 0.95]))
    flat = HitCurve(np.array([1000.0, 4000.0]), np.array([0.1, 0.4]))
    found = place(TABLES[:1] + TABLES[2:], 5500, curves={"user": steep, "rare": flat}, method=method)
    # 1000 bytes save 45 reads of the user table, 1000 more 2.5, and 4000 save 0.4 of the other.
    assert [option.bytes for option in found.options] == [2000, 1000]
    assert found.reads == pytest.approx(2.5 + 0.9)
    assert place(TABLES[:1], 1500, curves={"user": steep}).slow[0].hit_rate == pytest.approx(0.9)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_placements_of_tables_are_the_best_of_all(data):
    tables = [
        TableNeed(str(t), data.draw(st.integers(1, 50)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 20)),
                  hit_rate=data.draw(st.sampled_from([0.0, 0.5, 0.75])))
        for t in range(4)
    ]  # fmt: skip
    budget = data.draw(st.integers(0, 500))
    least = min(
        sum(table.misses for table in tables if table not in kept)
        for number in range(5)
        for kept in itertools.combinations(tables, number)
        if sum(table.size for table in kept) <= budget
    )
    assert place(tables, budget, method="exact").reads == pytest.approx(least)


def lagrangian(tables, counts, budget):
    """Takes single rows, most uses per byte first, while they fit."""
    rows = [
        (table.unique * use / sum(counts[table.name]) / table.row_bytes, table.row_bytes, t)
        for t, table in enumerate(tables)
        for use in counts[table.name]
        if use > 0
    ]
    taken, left, reads = [0] * len(tables), budget, sum(table.unique for table in tables)
    for density, size, t in sorted(rows, key=lambda row: -row[0]):
        if size <= left:
            taken[t], left, reads = taken[t] + 1, left - size, reads - density * size
    return taken, left, reads


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_row_split_takes_row_after_row(data):
    tables, counts = [], {}
    for t in range(data.draw(st.integers(1, 3))):
        uses = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum))
        tables.append(
            TableNeed(str(t), len(uses), data.draw(st.sampled_from([3, 8, 20])), data.draw(st.integers(1, 9)))
        )
        counts[str(t)] = uses
    budget = data.draw(st.integers(0, 150))
    found = split_rows(tables, counts, budget)
    _, left, reads = lagrangian(tables, counts, budget)
    # Rows that are used alike per byte may be taken from one table or another; if all rows are of one size, as many.
    assert found.memory_bytes <= budget
    if len({table.row_bytes for table in tables}) == 1:
        assert found.memory_bytes == budget - left
        assert found.reads == pytest.approx(reads)
    for table, rows in zip(tables, found.rows, strict=True):
        assert 0 <= rows <= np.count_nonzero(counts[table.name])


def test_row_split_equals_the_lagrangian_where_no_two_rows_are_alike():
    rng = np.random.default_rng(0)
    tables = [TableNeed(str(t), 60, size, 10.0 + t) for t, size in enumerate((8, 24, 100))]
    counts = {table.name: rng.gamma(0.4, size=60) for table in tables}
    for budget in (0, 50, 1000, 4000, 10**6):
        found = split_rows(tables, counts, budget)
        rows, left, reads = lagrangian(tables, counts, budget)
        assert list(found.rows) == rows and found.memory_bytes == budget - left
        assert found.reads == pytest.approx(reads, abs=1e-9)


def test_row_split_balances_reads_per_byte_over_tables():
    rng = np.random.default_rng(1)
    tables = [TableNeed(str(t), 20_000, 32 * (t + 1), 5.0 * (t + 1) ** 2) for t in range(3)]
    counts = {table.name: rng.zipf(1.5, 20_000) for table in tables}
    found = split_rows(tables, counts, 200_000)
    for table, rows in zip(tables, found.rows, strict=True):
        density = table.unique * counts[table.name] / counts[table.name].sum() / table.row_bytes
        hot = placement.hottest(counts[table.name], rows)
        assert np.delete(density, hot).max() <= found.density + 1e-15
        # What a row was too large for, the last few bytes, went to smaller rows that save less.
        assert np.count_nonzero(density[hot] < found.density - 1e-15) <= 2
    assert [table.unique for table in found.slow] == pytest.approx(found.table_reads)
    whole = place(tables, 200_000)
    assert found.reads < whole.reads


def test_row_split_honours_fixed_tables_and_entries():
    counts = {"user": np.r_[9, np.ones(999)], "item": np.arange(100), "rare": np.ones(5000)}
    found = split_rows(TABLES, counts, 11_000, fixed={"item": "memory", "user": "direct"}, entry_bytes=8)
    assert found.rows == (0, 100, 9) and found.memory_bytes == 10_000 + 9 * 108
    assert found.table_reads == pytest.approx((50, 0, 1 - 9 / 5000))
    assert [table.name for table in found.slow] == ["user", "rare"]
    nothing = split_rows(TABLES, counts, 99)
    assert (
        nothing.rows == (0, 0, 0)
        and nothing.reads == pytest.approx(251)
        and nothing.density == pytest.approx(200 * 99 / 4950 / 100)
    )


def test_hottest_rows_come_first():
    assert placement.hottest([3, 9, 3, 1], 3).tolist() == [1, 0, 2]


def test_a_placement_is_told_in_words():
    rows = place(TABLES, 20_000).rows()
    assert rows[1] == {
        "table": "item",
        "tier": "memory",
        "size": "10kB",
        "fast memory": "10kB",
        "look-ups per query": "200",
        "slow reads per query": "0",
    }


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: place(TABLES, -1), ValueError, "budget must be a finite number of bytes"),
        (lambda: place(TABLES, 1, cache_bytes=-1), ValueError, "cache_bytes"),
        (lambda: place(TABLES, 1, dense_bytes=math.nan), ValueError, "dense_bytes"),
        (lambda: place(TABLES, 10, dense_bytes=11), OverBudget, "need 11 bytes, but budget is 10"),
        (lambda: place(TABLES, 10, fixed={"item": "memory"}), OverBudget, "need 10000 bytes"),
        (lambda: place(TABLES, 10, fixed={"itme": "memory"}), ValueError, r"fixed names tables .* \['itme'\]"),
        (lambda: place(TABLES, 10, fixed={"item": "dram"}), ValueError, r"fixed\['item'\] must be one of"),
        (lambda: place(TABLES, 10, curves={"x": HitCurve([1], [0.1])}), ValueError, "curves names tables"),
        (lambda: place(TABLES, 10, bypass=1.5), ValueError, "bypass must be from 0 to 1"),
        (lambda: place(TABLES, 10, method="best"), ValueError, "method must be one of"),
        (lambda: place([*TABLES, TABLES[0]], 10), ValueError, "names of their own"),
        (lambda: split_rows(TABLES, {}, 10), ValueError, "counts must have table 'user'"),
        (lambda: split_rows(TABLES[1:2], {"item": [1, 2]}, 10), ValueError, "must be 100 numbers"),
        (lambda: split_rows(TABLES[1:2], {"item": -np.ones(100)}, 10), ValueError, "0 or more"),
        (lambda: split_rows(TABLES[1:2], {"item": np.ones(100)}, 10, entry_bytes=-1), ValueError, "entry_bytes"),
        (lambda: placement.hottest([1], 2), ValueError, "rows must be from 0 to 1"),
        (lambda: knapsack.greedy([[Option("a", 3, 0)]], 2), OverBudget, "need 3 bytes, but budget is 2"),
    ],
)
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
