"""Queries one after another, fetched ahead by a thread of their own while the caller computes."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from jaxeff.sdm.io.errors import DeadlineExceeded, ReadError
from jaxeff.sdm.lookups import Failed, Plan
from jaxeff.sdm.queries import Query


class Source(Protocol):
    """Where queries are planned and fetched: `Tiers`, or `Resident` above them."""

    @property
    def buffers(self) -> int:
        """One more than the queries that may be fetched ahead."""

    @property
    def lookahead(self) -> bool:
        """Whether it can be told of queries before they are fetched."""

    def plan(self, asked: Query) -> Plan:
        """Says which rows a query needs."""

    def expect(self, plan: Plan) -> Plan:
        """Says that a plan will be fetched, and gives it a number."""

    def forget_expected(self) -> None:
        """Says that what was expected and was not fetched will not come."""

    def fetch(self, plan: Plan, deadline: float | None) -> Any:
        """Brings the rows."""


def stream(
    source: Source,
    asked: Iterable[Query],
    *,
    depth: int = 2,
    lookahead: int = 0,
    deadline: float | None = None,
    keep_going: bool = False,
) -> Generator[Any, None, None]:
    """Yields every query with its rows at hand, while those of the next ones are fetched.

    The caller pools each query before asking for the next one, by `Tiers.pool` or by a program of its own whose results
    `Tiers.read_by` is told.

    Args:
      source: the tables.
      asked: the queries; read as far ahead as needed and no further.
      depth: queries fetched ahead.
      lookahead: queries whose rows the cache is told of before they are fetched, so that rows needed soon stay.
      deadline: seconds for reading the rows of each query.
      keep_going: whether a query that misses its deadline or cannot be read is yielded as `Failed`, and the stream goes
        on, as a server wants it; otherwise its error ends the stream, with the queries that were taken after it.

    Yields:
      The queries in order, each `Staged` or `Failed`. Leaving the generator waits for the query that is being fetched,
      and for the next of `asked` if that is being waited for: end a queue by a last entry.

    Raises:
      ValueError: for a depth below 1 or not below the buffers of the source, or a lookahead that it cannot have.
      Exception: what planning or fetching a query raised, when it is that query's turn.
    """
    if not 1 <= depth < source.buffers:
        raise ValueError(f"depth={depth} must be 1 .. {source.buffers - 1}, one less than the buffers of the tiers")
    if lookahead < 0 or (lookahead and not source.lookahead):
        raise ValueError(f"lookahead={lookahead} must be 0, or above with tiers that were opened with lookahead=True")
    return _stream(source, _planned(source, asked, lookahead), depth, deadline, keep_going, lookahead > 0)


def _stream(
    source: Source, plans: Iterator[Plan], depth: int, deadline: float | None, keep_going: bool, told: bool
) -> Generator[Any, None, None]:
    def work() -> Any:
        plan = next(plans, None)
        if plan is None:
            return None
        try:
            return source.fetch(plan, deadline)
        except (DeadlineExceeded, ReadError) as error:
            if not keep_going:
                raise
            return Failed(plan, error)

    try:
        with ThreadPoolExecutor(1, thread_name_prefix="jaxeff-fetch") as thread:
            ahead: deque[Future[Any]] = deque(thread.submit(work) for _ in range(depth))
            try:
                while (staged := ahead.popleft().result()) is not None:
                    # Before the caller computes, so that reading goes on meanwhile.
                    ahead.append(thread.submit(work))
                    yield staged
            finally:
                for future in ahead:
                    future.cancel()
    finally:
        if told:
            source.forget_expected()


def _planned(source: Source, asked: Iterable[Query], lookahead: int) -> Iterator[Plan]:
    """Plans of queries, each after the cache was told of those that follow it."""
    queries = iter(asked)
    known: deque[Plan | Exception] = deque()
    while True:
        while len(known) <= lookahead:
            try:
                query = next(queries, None)
                if query is None:
                    break
                plan = source.plan(query)
                known.append(source.expect(plan) if lookahead else plan)
            except Exception as error:  # those before it come first
                known.append(error)
                queries = iter(())
                break
        if not known:
            return
        plan_or_error = known.popleft()
        if isinstance(plan_or_error, Exception):
            raise plan_or_error
        yield plan_or_error
