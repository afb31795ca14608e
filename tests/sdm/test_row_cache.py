"""The row cache against dictionaries, lists, and a plain loop of CLOCK; both of its forms alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxeff.ops import native
from jaxeff.sdm import reuse, row_cache
from jaxeff.sdm.row_cache import NEVER, RowCache, row_keys
from jaxeff.sdm.sets import Sets


def why_not():
    """Why there is no compiled code, or nothing."""
    try:
        native.load(row_cache.SOURCE)
        return ""
    except native.UnavailableError as error:
        return str(error)


MISSING = why_not()
FORMS = [False, pytest.param(True, marks=pytest.mark.skipif(bool(MISSING), reason=MISSING))]
BYTES = 8


def rows_of(keys):
    """A row of 8 bytes that tells its key."""
    return np.ascontiguousarray(keys)[:, None].view(np.uint8)


def replay(cache, batches):
    for keys in batches:
        slots = cache.lookup(keys)
        cache.insert(keys[slots < 0], np.zeros((int((slots < 0).sum()), cache.row_bytes), np.uint8))


def skewed(seed, accesses=60_000, distinct=5000):
    """Batches of distinct keys; a tenth of the rows is used most, and half of the uses come in bursts."""
    rng = np.random.default_rng(seed)
    ids = (distinct * rng.random(accesses) ** 4).astype(np.int64)
    moments = np.where(rng.random(accesses) < 0.5, rng.random(accesses), (ids * 0.6180339887) % 1)
    moments += 0.01 * rng.standard_normal(accesses)
    trace = row_keys(ids % 7, ids)[np.argsort(moments)].reshape(-1, 200)
    return [keys[np.sort(np.unique(keys, return_index=True)[1])] for keys in trace]


class PlainClock:
    """CLOCK with next uses, one key after the other, of the sets that a cache has."""

    def __init__(self, sets):
        self.sets, self.ways = sets, [[] for _ in range(sets.sets)]
        self.hands = [0] * sets.sets
        self.now, self.choosy = 0, False

    def _set(self, key):
        return int(self.sets.locate(np.array([key], np.uint64))[0][0])

    def lookup(self, keys, uses):
        hits = []
        for key, use in zip(keys.tolist(), uses, strict=True):
            way = next((way for way in self.ways[self._set(key)] if way["key"] == key), None)
            hits.append(way is not None)
            if way is not None:
                way |= {"used": True, "next": use}
        return hits

    def insert(self, keys, uses):
        kept, mine = [], set(keys.tolist())
        present = {way["key"] for ways in self.ways for way in ways}
        inside = mine & present
        for key, use in zip(keys.tolist(), uses, strict=True):
            ways, at = self.ways[self._set(key)], self._set(key)
            if key in present:
                next(way for way in ways if way["key"] == key)["next"] = use
                kept.append(True)
                continue
            new = {"key": key, "used": False, "next": use}
            if len(ways) < self.sets.ways:
                ways.append(new)
                kept.append(True)
                inside.add(key)
                continue
            use_of = lambda way: NEVER if way["next"] < self.now else way["next"]
            free = [way for way in ways if way["key"] not in inside]
            last = max(map(use_of, free), default=-1)
            if not free or (use >= last and (self.choosy or last != NEVER)):
                kept.append(False)
                continue
            free = [id(way) for way in free if use_of(way) == last]
            while True:
                way = ways[self.hands[at]]
                if id(way) in free and not way["used"]:
                    break
                if id(way) in free:
                    way["used"] = False
                self.hands[at] = (self.hands[at] + 1) % self.sets.ways
            ways[self.hands[at]] = new
            self.hands[at] = (self.hands[at] + 1) % self.sets.ways
            kept.append(True)
            inside.add(key)
        return kept


@pytest.mark.parametrize("compiled", FORMS)
@pytest.mark.parametrize("organisation", ["compact", "fast"])
def test_never_a_row_of_another_key_and_no_count_lost(compiled, organisation):
    rng = np.random.default_rng(0)
    bounds = (3, 300) if organisation == "compact" else None
    cache = RowCache(2500, BYTES, organisation, bounds=bounds, compiled=compiled)
    known, probes = {}, 0
    for _ in range(150):
        keys = rng.permutation(np.unique(row_keys(rng.integers(0, 3, 50), rng.integers(0, 300, 50))))
        slots = cache.lookup(keys)
        probes += len(keys)
        for key, slot in zip(keys.tolist(), slots, strict=True):
            if slot >= 0:
                assert cache.rows[slot].tobytes() == known[key]
        fresh = rng.integers(0, 256, (len(keys), BYTES + 2)).astype(np.uint8)
        # Misses, and some rows that are here, with new contents.
        chosen = (slots < 0) | (rng.random(len(keys)) < 0.2)
        kept = cache.insert(keys[chosen], fresh[chosen])
        for key, row, slot in zip(keys[chosen].tolist(), fresh[chosen], kept, strict=True):
            known[key] = row[:BYTES].tobytes()
            assert slot < 0 or cache.rows[slot].tobytes() == known[key]
        here, where = cache.contents()
        assert len(np.unique(here)) == len(here) == len(cache) <= cache.capacity
        np.testing.assert_array_equal(cache.find(here), where)
    assert cache.hits + cache.misses == probes
    assert cache.hits > 500 and cache.evictions > 500


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_same_hits_and_evictions_as_a_plain_loop(data):
    ahead = data.draw(st.booleans())
    cache = RowCache(data.draw(st.integers(120, 900)), BYTES, bounds=(1, 64), ahead=ahead, compiled=False)
    plain = PlainClock(cache.sets)
    for batch in range(data.draw(st.integers(1, 8))):
        keys = np.array(data.draw(st.lists(st.integers(0, 63), unique=True, max_size=40)), np.uint64)
        steps = data.draw(st.lists(st.integers(1, 6), min_size=len(keys), max_size=len(keys)))
        uses = np.array([NEVER if step > 3 or not ahead else batch + step for step in steps], np.int32)
        given = uses if ahead else None
        plain.now, plain.choosy = batch, ahead and batch % 2 == 1
        cache.advance(batch, choosy=plain.choosy)
        slots = cache.lookup(keys, given)
        assert (slots >= 0).tolist() == plain.lookup(keys, uses.tolist())
        missed = slots < 0
        kept = cache.insert(keys[missed], rows_of(keys[missed]), None if given is None else given[missed])
        assert (kept >= 0).tolist() == plain.insert(keys[missed], uses[missed].tolist())
        assert set(cache.contents()[0].tolist()) == {way["key"] for ways in plain.ways for way in ways}


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize(
    "capacity, row_bytes, bounds, ahead",
    [(3000, 8, (3, 200), False), (9000, 24, None, True), (20000, 300, None, False), (100, 16, None, False)],
)
def test_compiled_code_and_numpy_do_the_same(capacity, row_bytes, bounds, ahead):
    rng = np.random.default_rng(0)
    ours, theirs = (
        RowCache(capacity, row_bytes, bounds=bounds, ahead=ahead, compiled=compiled) for compiled in (False, True)
    )
    for batch in range(60):
        ids = (200 * rng.random(80) ** 3).astype(np.int64)
        keys = rng.permutation(np.unique(row_keys(rng.integers(0, 3, 80), ids)))
        uses = np.where(rng.random(len(keys)) < 0.5, NEVER, batch + rng.integers(0, 5, len(keys))).astype(np.int32)
        rows = rng.integers(0, 256, (len(keys) + 3, row_bytes + 1)).astype(np.uint8)
        hold, found = batch % 5 == 0, []
        for cache in (ours, theirs):
            cache.advance(batch, choosy=batch % 3 == 0)
            slots = cache.lookup(keys, uses if ahead else None, hold=hold)
            missed = np.flatnonzero(slots < 0)
            # Some stand twice.
            missed = np.concatenate([missed, missed[:3]])
            kept = cache.insert(keys[missed], rows[: len(missed)], uses[missed] if ahead else None)
            out = cache.take(np.concatenate([slots, kept]), np.zeros((len(slots) + len(kept), row_bytes), np.uint8))
            cache.release()
            cache.discard(keys[:2])
            found.append((slots, kept, out, cache.rows, *cache.contents(), cache.hits, cache.misses, cache.evictions))
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("organisation, limit", [("compact", 0.01), ("fast", 0.02)])
def test_hits_like_a_fully_associative_lru_cache(organisation, limit):
    batches = skewed(0)
    flat = np.concatenate(batches)
    distinct = len(np.unique(flat))
    for share in (0.01, 0.05, 0.2, 0.5):
        each = BYTES + (5 if organisation == "compact" else 9)
        cache = RowCache(int(share * distinct * each), BYTES, organisation, bounds=(7, 5000))
        replay(cache, batches)
        assert cache.hits / len(flat) > reuse.lru_hits(flat, cache.capacity) / len(flat) - limit
        assert cache.hits <= reuse.belady_hits(flat, cache.capacity)


@given(
    st.integers(2, 5000), st.one_of(st.none(), st.tuples(st.integers(1, 2**24), st.integers(0, 40))), st.integers(0, 9)
)
@settings(deadline=None)
def test_set_and_tag_give_the_key_back(count, bounds, seed):
    tables, row_bits = (None, 40) if bounds is None else bounds
    sets = Sets(count, 15, tables, row_bits)
    rng = np.random.default_rng(seed)
    keys = row_keys(rng.integers(0, tables or 2**24, 200), rng.integers(0, 2**row_bits, 200))
    index, tags = sets.locate(keys)
    assert 0 <= index.min() and index.max() < count
    assert tags.dtype.itemsize == sets.tag_bytes
    np.testing.assert_array_equal(sets.keys(index, tags), keys)
    assert not (tags == sets.vacant(index)).any()


def test_sets_are_filled_evenly():
    # A table's rows, of any stride, as random ones would be: the variance of a Poisson count is its mean.
    for stride in (1, 64, 4096):
        for sets in (Sets(1000, 31, 26, 30), Sets(1000, 31)):
            index, _ = sets.locate(row_keys(3, np.arange(20_000) * stride))
            counts = np.bincount(index, minlength=1000)
            assert 0.7 < counts.var() / 20 < 1.3


def test_tags_take_four_bytes_where_that_is_exact():
    assert RowCache(2**20, 64, bounds=(800, 40_000_000)).sets.tag_bytes == 4
    assert RowCache(2**20, 64).sets.tag_bytes == 8
    # 2**40 rows of 2**20 tables need sets that are not there.
    assert RowCache(2**20, 64, bounds=(2**20, 2**40)).sets.tag_bytes == 8


@given(st.integers(60, 20_000), st.integers(1, 600), st.booleans())
@settings(deadline=None)
def test_the_budget_holds_rows_and_what_is_kept_about_them(capacity, row_bytes, ahead):
    try:
        cache = RowCache(capacity, row_bytes, ahead=ahead, compiled=False)
    except ValueError:
        assert capacity < 2 * (row_bytes + 30)
        return
    assert cache.bytes <= capacity
    if capacity > 20 * (row_bytes + 14):
        assert cache.bytes > 0.8 * capacity
    assert cache.bytes == cache.rows.nbytes + round(cache.metadata_per_row * cache.capacity)


def test_organisation_follows_the_size_of_rows():
    assert RowCache(2**16, 254).organisation == "compact"
    assert RowCache(2**16, 255).organisation == "fast"
    assert RowCache(2**20, 64, bounds=(26, 10**6)).metadata_per_row < 4.5


@pytest.mark.parametrize("compiled", FORMS)
def test_a_row_is_safe_from_the_call_that_brought_it(compiled):
    cache = RowCache(200, BYTES, compiled=compiled)
    keys = np.arange(500, dtype=np.uint64)
    slots = cache.insert(keys, rows_of(keys))
    kept = slots >= 0
    assert kept.sum() == cache.capacity == len(np.unique(slots[kept]))
    assert cache.evictions == 0
    np.testing.assert_array_equal(cache.rows[slots[kept]], rows_of(keys[kept]))


@pytest.mark.parametrize("compiled", FORMS)
def test_what_is_held_stays_until_it_is_released(compiled):
    cache = RowCache(400, BYTES, compiled=compiled)
    keys = np.arange(5, dtype=np.uint64)
    cache.insert(keys, rows_of(keys))
    slots = cache.lookup(keys, hold=True)
    for start in range(100, 1000, 50):
        others = np.arange(start, start + 50, dtype=np.uint64)
        cache.insert(others, rows_of(others))
    np.testing.assert_array_equal(cache.find(keys), slots)
    # What came in meanwhile was held too, and then there was no room.
    assert cache.evictions == 0
    cache.release()
    for start in range(100, 1000, 50):
        others = np.arange(start, start + 50, dtype=np.uint64)
        cache.insert(others, rows_of(others))
    assert (cache.find(keys) == -1).all()


@pytest.mark.parametrize("compiled", FORMS)
def test_of_a_key_that_stands_twice_the_last_row_is_kept(compiled):
    cache = RowCache(1000, BYTES, compiled=compiled)
    keys = np.array([7, 8, 7], np.uint64)
    slots = cache.insert(keys, np.arange(24, dtype=np.uint8).reshape(3, 8))
    assert slots[0] == slots[2] != slots[1]
    np.testing.assert_array_equal(cache.rows[slots[0]], np.arange(16, 24))
    assert len(cache) == 2


@pytest.mark.parametrize("compiled", FORMS)
def test_rows_are_taken_to_their_places(compiled):
    cache = RowCache(1000, BYTES, compiled=compiled)
    keys = row_keys(1, np.arange(6))
    slots = cache.insert(keys, rows_of(keys))
    slots[2] = -1
    out = np.full((10, 12), 9, np.uint8)
    cache.take(slots, out, at=np.array([9, 8, 7, 0, 1, 2]))
    np.testing.assert_array_equal(out[[9, 8, 0, 1, 2], :BYTES], rows_of(keys[[0, 1, 3, 4, 5]]))
    assert (out[[3, 4, 5, 6, 7]] == 9).all() and (out[:, BYTES:] == 9).all()


def test_warming_keeps_the_first_and_counts_nothing():
    cache = RowCache(300, BYTES)
    keys = np.arange(100, dtype=np.uint64)
    slots = cache.warm(keys, rows_of(keys))
    assert (cache.hits, cache.misses, cache.evictions) == (0, 0, 0)
    # Of each set the first of its keys.
    index, _ = cache.sets.locate(keys)
    for one in range(cache.sets.sets):
        np.testing.assert_array_equal((slots[index == one] >= 0)[: cache.sets.ways], True)
    assert (slots >= 0).sum() == len(cache)


def test_forgotten_rows_are_gone():
    cache = RowCache(1000, BYTES)
    keys = np.arange(10, dtype=np.uint64)
    cache.insert(keys, rows_of(keys))
    cache.discard(np.array([3, 4, 99], np.uint64))
    assert (cache.find(keys) >= 0).tolist() == [key not in (3, 4) for key in range(10)]
    assert len(cache) == 8
    cache.clear()
    assert len(cache) == 0


def test_an_empty_call_does_nothing():
    cache, none = RowCache(1000, BYTES), np.empty(0, np.uint64)
    assert cache.lookup(none).shape == cache.insert(none, np.empty((0, BYTES), np.uint8)).shape == (0,)
    assert cache.take(np.empty(0, np.int64), np.empty((0, BYTES), np.uint8)).shape == (0, BYTES)


def test_without_compiled_code_all_works(monkeypatch):
    monkeypatch.setenv("JAXEFF_NATIVE", "0")
    assert not RowCache(1000, BYTES).compiled
    with pytest.raises(native.UnavailableError, match="JAXEFF_NATIVE=0"):
        RowCache(1000, BYTES, compiled=True)


def test_mistakes_are_named():
    cache = RowCache(1000, BYTES, bounds=(2, 100))
    for keys, text in ((np.zeros(2, np.int64), "uint64"), (row_keys(2, [5]), "table 2"), (row_keys(1, [200]), "row 2")):
        with pytest.raises(ValueError, match=text):
            cache.lookup(keys)
    key = row_keys(1, [5])
    with pytest.raises(ValueError, match=r"rows must be uint8 \[1, at least 8\]"):
        cache.insert(key, np.zeros((1, 7), np.uint8))
    with pytest.raises(ValueError, match="ahead=True"):
        cache.insert(key, np.zeros((1, 8), np.uint8), np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="slots must be below"):
        cache.take(np.array([10**6]), np.zeros((1, 8), np.uint8))
    with pytest.raises(ValueError, match="out must have a row"):
        cache.take(np.array([-1, -1]), np.zeros((1, 8), np.uint8))
    with pytest.raises(ValueError, match="out must be uint8"):
        cache.take(np.array([-1]), np.zeros((1, 8), np.int8))
    for arguments, text in (
        ({"organisation": "large"}, "organisation"), ({"bounds": (0, 5)}, "bounds"), ({"capacity_bytes": 9}, "hold"),
        ({"row_bytes": 0}, "row_bytes"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            RowCache(**{"capacity_bytes": 1000, "row_bytes": 8} | arguments)
    for tables, rows in ((-1, 0), (2**24, 0), (0, 2**40)):
        with pytest.raises(ValueError, match="must be 0 .."):
            row_keys(np.array([tables]), np.array([rows]))
