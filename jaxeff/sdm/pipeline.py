"""Queries one after another, fetched ahead by a thread of their own while the caller computes."""

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from jaxeff.sdm.lookups import Plan, Staged
from jaxeff.sdm.queries import Query
from jaxeff.sdm.tiers import Tiers


def stream(
    tiers: Tiers, asked: Iterable[Query], *, depth: int = 2, lookahead: int = 0, deadline: float | None = None
) -> Generator[Staged, None, None]:
    """Yields every query with its rows at hand, while those of the next ones are fetched.

    While the generator runs, its thread alone plans and fetches. The caller pools each query before asking for the next
    one, by `Tiers.pool` or by a program of its own whose results `Tiers.read_by` is told.

    Args:
      tiers: the tables.
      asked: the queries; read as far ahead as needed and no further.
      depth: queries fetched ahead.
      lookahead: queries whose rows the caches are told of before they are fetched, so that rows needed soon stay.
      deadline: seconds for reading the rows of each query.

    Yields:
      The queries, in order.

    Raises:
      ValueError: for a depth below 1 or not below the tiers' buffers, or a lookahead below 0.
      Exception: what planning or fetching a query raised, when it is that query's turn.
    """
    if not 1 <= depth < tiers.buffers:
        raise ValueError(f"depth={depth} must be 1 .. {tiers.buffers - 1}, one less than the buffers of the tiers")
    if lookahead < 0 or (lookahead and not tiers.lookahead):
        raise ValueError(f"lookahead={lookahead} must be 0, or above with tiers that were opened with lookahead=True")
    return _stream(tiers, _planned(tiers, asked, lookahead), depth, deadline)


def _stream(tiers: Tiers, plans: Iterator[Plan], depth: int, deadline: float | None) -> Generator[Staged, None, None]:
    def work() -> Staged | None:
        plan = next(plans, None)
        return None if plan is None else tiers.fetch(plan, deadline)

    with ThreadPoolExecutor(1, thread_name_prefix="jaxeff-fetch") as thread:
        ahead: deque[Future[Staged | None]] = deque(thread.submit(work) for _ in range(depth))
        try:
            while (staged := ahead.popleft().result()) is not None:
                # Before the caller computes, so that reading goes on meanwhile.
                ahead.append(thread.submit(work))
                yield staged
        finally:
            for future in ahead:
                future.cancel()


def _planned(tiers: Tiers, asked: Iterable[Query], lookahead: int) -> Iterator[Plan]:
    """Plans of queries, each after the caches were told of those that follow it."""
    source = iter(asked)
    known: deque[Plan] = deque()
    while True:
        for query in itertools.islice(source, lookahead + 1 - len(known)):
            plan = tiers.plan(query)
            if lookahead:
                tiers.expect(plan)
            known.append(plan)
        if not known:
            return
        yield known.popleft()
