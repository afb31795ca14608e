"""Hosts, watts, money and wear of serving a model with and without slow memory.

    P = N_host * P_host + N_helper * P_helper,  N_host = QPS / QPS_host rounded up,  saving = 1 - P(new) / P(base)

Power is in watts or in any unit that both sides of a comparison share; 1.0 may stand for a host of the base. Queries
per second of a host come from `jaxeff.sdm.planner.predict`, or are known.

`PUBLISHED` holds the three scenarios of "Supporting Massive DLRM Inference Through Software Defined Memory" (arXiv
2110.11489) as examples. Their figures are [recalled], not read again in the paper: inputs of a calculator, no facts.
The paper's abstract has savings from 5 % to 29 % [paper], and the arithmetic gives both ends.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxeff import drawing
from jaxeff.sdm.device import DeviceProfile
from jaxeff.sdm.planner import drive_writes_per_day

HOURS_PER_YEAR = 8766.0
# A quotient that is whole but for rounding takes no further host.
_WHOLE = 1e-9


@dataclasses.dataclass(frozen=True)
class Host:
    """A kind of host.

    Attributes:
      name: for people.
      qps: queries per second of one host that is busy all the time.
      power: of one host.
      utilisation: share of its time that it is busy: what it serves is qps times this. Models that share a host raise
        it.
      dollars: that one host costs.
      helpers: hosts for each of these that hold tables for it; 0.2 is one helper for five hosts.
      helper_power: of one helper.
      helper_dollars: that one helper costs.
    """

    name: str
    qps: float
    power: float
    utilisation: float = 1.0
    dollars: float = 0.0
    helpers: float = 0.0
    helper_power: float = 0.0
    helper_dollars: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.qps < math.inf or not 0 < self.utilisation <= 1:
            raise ValueError(
                f"host {self.name!r} must serve qps above 0 with utilisation above 0 and at most 1, got {self.qps} and "
                f"{self.utilisation}"
            )
        for field in ("power", "dollars", "helpers", "helper_power", "helper_dollars"):
            value = getattr(self, field)
            if not 0 <= value < math.inf:
                raise ValueError(f"{field} of host {self.name!r} must be a finite number from 0, got {value}")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A load, and two ways to serve it.

    Attributes:
      name: for people.
      qps: queries per second of the whole load.
      base: hosts without slow memory.
      sdm: hosts with it.
      origin: where the figures come from.
    """

    name: str
    qps: float
    base: Host
    sdm: Host
    origin: str = "given"

    def __post_init__(self) -> None:
        if not 0 < self.qps < math.inf:
            raise ValueError(f"qps of scenario {self.name!r} must be a finite number above 0, got {self.qps}")


class Fleet(NamedTuple):
    """Hosts that serve a load.

    Attributes:
      hosts: how many.
      helpers: how many.
      power: of all together.
      dollars: that all cost to buy.
    """

    hosts: int
    helpers: int
    power: float
    dollars: float


class Comparison(NamedTuple):
    """A scenario worked out.

    Attributes:
      name: of the scenario.
      base: fleet without slow memory.
      sdm: fleet with it.
      saving: share of the power that is saved; negative if it needs more.
      origin: of the figures.
    """

    name: str
    base: Fleet
    sdm: Fleet
    saving: float
    origin: str


class Wear(NamedTuple):
    """What model updates do to drives.

    Attributes:
      needed: drive writes per day.
      rated: drive writes per day.
      endures: whether the drives are rated for it.
      years: until the writes for which they are rated are used up, whatever the warranty; infinite without updates.
    """

    needed: float
    rated: float
    endures: bool
    years: float


PUBLISHED: tuple[Scenario, ...] = (
    Scenario(
        "M1: 143 GB on CPUs, NAND",
        qps=240 * 1200,
        base=Host("two sockets", qps=240, power=1.0),
        sdm=Host("one socket and NAND", qps=120, power=0.4),
        origin="[recalled]",
    ),
    Scenario(
        "M2: 150 GB on accelerators, Optane",
        qps=450 * 1500,
        base=Host("accelerator and helpers", qps=450, power=1.0, helpers=0.2, helper_power=0.25),
        sdm=Host("accelerator and Optane", qps=450, power=1.0),
        origin="[recalled]",
    ),
    # The number of hosts is not known; any large one gives the same saving.
    Scenario(
        "M3: 1 TB, many tenants, Optane",
        qps=630_000,
        base=Host("shared accelerator", qps=1000, power=1.0, utilisation=0.63),
        sdm=Host("shared accelerator and Optane", qps=1000, power=1.01, utilisation=0.90),
        origin="[recalled]",
    ),
)
"""The three published scenarios, their power relative to a host of the base. [recalled]"""


def fleet(host: Host, qps: float) -> Fleet:
    """As many hosts, with their helpers, as serve a load.

    Args:
      host: the kind.
      qps: queries per second of the load.

    Raises:
      ValueError: for a load that is negative or not finite.
    """
    if not 0 <= qps < math.inf:
        raise ValueError(f"qps must be a finite number from 0, got {qps}")
    hosts = _up(qps / (host.qps * host.utilisation))
    helpers = _up(hosts * host.helpers)
    return Fleet(
        hosts,
        helpers,
        power=hosts * host.power + helpers * host.helper_power,
        dollars=hosts * host.dollars + helpers * host.helper_dollars,
    )


def compare(scenario: Scenario) -> Comparison:
    """Works a scenario out.

    >>> [round(100 * compare(scenario).saving) for scenario in PUBLISHED]
    [20, 5, 29]
    """
    base, sdm = fleet(scenario.base, scenario.qps), fleet(scenario.sdm, scenario.qps)
    saving = 1 - sdm.power / base.power if base.power else 0.0
    return Comparison(scenario.name, base, sdm, saving, scenario.origin)


def equipped(
    host: Host,
    *,
    qps: float | None = None,
    drive: DeviceProfile | None = None,
    drives: int = 0,
    memory_gb: float = 0.0,
    memory_watts_per_gb: float = 0.0,
    memory_dollars_per_gb: float = 0.0,
) -> Host:
    """A host with drives and memory added; its power must be in watts then.

    Args:
      host: without them.
      qps: that it serves with them, as of `planner.predict`; None for what it served.
      drive: profile of the drives; None for none.
      drives: how many.
      memory_gb: of DRAM; below 0 where slow memory replaces some.
      memory_watts_per_gb: of DRAM.
      memory_dollars_per_gb: of DRAM.

    Raises:
      ValueError: for negative numbers of drives or prices, drives without a profile, or more memory taken out than
        was paid for.
    """
    if drives < 0 or (drives and drive is None) or min(memory_watts_per_gb, memory_dollars_per_gb) < 0:
        raise ValueError(
            f"drives must be 0 or more and have a profile, and watts and dollars per GB be 0 or more, got drives="
            f"{drives}, drive={drive}, {memory_watts_per_gb} W/GB, {memory_dollars_per_gb} dollars/GB"
        )
    power = host.power + memory_gb * memory_watts_per_gb
    dollars = host.dollars + memory_gb * memory_dollars_per_gb
    name = host.name
    if drive is not None and drives:
        power += drives * drive.watts
        dollars += drives * drive.capacity_bytes / 1e9 * drive.dollars_per_gb
        name = f"{name}, {drives} x {drive.name}"
    return dataclasses.replace(host, name=name, qps=host.qps if qps is None else qps, power=power, dollars=dollars)


def energy_dollars(watts: float, *, years: float = 1.0, dollars_per_kwh: float, overhead: float = 1.0) -> float:
    """What a power costs.

    Args:
      watts: drawn all the time.
      years: for so long.
      dollars_per_kwh: price of energy.
      overhead: of the building, its power over that of what it houses (PUE).

    Raises:
      ValueError: for negative numbers, or an overhead below 1.
    """
    if not (watts >= 0 and years >= 0 and dollars_per_kwh >= 0 and overhead >= 1):
        raise ValueError(
            f"watts, years and dollars_per_kwh must be 0 or more and overhead at least 1, got {watts}, {years}, "
            f"{dollars_per_kwh}, {overhead}"
        )
    return watts / 1000 * HOURS_PER_YEAR * years * overhead * dollars_per_kwh


def wear(
    drive: DeviceProfile,
    drives: int,
    update_bytes: float,
    interval_seconds: float,
    *,
    write_amplification: float = 1.0,
    rated_years: float = 5.0,
) -> Wear:
    """Whether the drives of a host endure its model updates.

    Args:
      drive: their profile.
      drives: that share the writes.
      update_bytes: of one update of the host; `demand.updated_bytes` for changed rows alone.
      interval_seconds: between updates.
      write_amplification: bytes that the medium writes for each byte of an update.
      rated_years: for which the drive's rating holds: vendors' data sheets mostly say five.

    Raises:
      ValueError: for no drives, or what `planner.drive_writes_per_day` refuses.
    """
    if drives < 1:
        raise ValueError(f"drives must be at least 1, got {drives}")
    needed = drive_writes_per_day(
        update_bytes, interval_seconds, drives * drive.capacity_bytes, write_amplification=write_amplification
    )
    years = rated_years * drive.dwpd / needed if needed else math.inf
    return Wear(needed, drive.dwpd, needed <= drive.dwpd, years)


def scenario_table(
    scenarios: Sequence[Scenario] = PUBLISHED,
    *,
    watts_per_unit: float | None = None,
    dollars_per_kwh: float | None = None,
    overhead: float = 1.0,
) -> list[dict[str, str]]:
    """Scenarios in words, a row for each, for `markdown`.

    Args:
      scenarios: to work out.
      watts_per_unit: of power; 1 if it is in watts already. None shows power without a unit.
      dollars_per_kwh: price of energy; None leaves money for energy out.
      overhead: of the building, as of `energy_dollars`.

    Raises:
      ValueError: for a price of energy without `watts_per_unit`, or what `energy_dollars` refuses.
    """
    if dollars_per_kwh is not None and watts_per_unit is None:
        raise ValueError("dollars_per_kwh needs watts_per_unit: what one unit of power is")
    rows = []
    for scenario in scenarios:
        found = compare(scenario)
        row = {
            "scenario": scenario.name,
            "QPS": drawing.short(scenario.qps),
            "hosts": f"{_hosts(found.base)} -> {_hosts(found.sdm)}",
        }
        if watts_per_unit is None:
            row["power"] = f"{found.base.power:,.0f} -> {found.sdm.power:,.0f}"
        else:
            watts = [one.power * watts_per_unit for one in (found.base, found.sdm)]
            row["power"] = " -> ".join(drawing.short(value) + "W" for value in watts)
        row["power saved"] = f"{100 * found.saving:.0f} %"
        if found.base.dollars or found.sdm.dollars:
            row["hosts cost"] = f"${drawing.short(found.base.dollars)} -> ${drawing.short(found.sdm.dollars)}"
        if watts_per_unit is not None and dollars_per_kwh is not None:
            costs = [energy_dollars(value, dollars_per_kwh=dollars_per_kwh, overhead=overhead) for value in watts]
            row["energy of a year"] = " -> ".join("$" + drawing.short(cost) for cost in costs)
        row["figures"] = scenario.origin
        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table in Markdown; a column for each key of any row, the first to the left and numbers to the right.

    >>> print(markdown([{"tier": "memory", "bytes": "3k"}]))
    | tier | bytes |
    | --- | ---: |
    | memory | 3k |
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rule = ["---", *("---:" for _ in columns[1:])]
    lines = [columns, rule[: len(columns)], *([row.get(key, "") for key in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _hosts(found: Fleet) -> str:
    return f"{found.hosts:,}" + (f" + {found.helpers:,}" if found.helpers else "")


def _up(number: float) -> int:
    return math.ceil(number * (1 - _WHOLE))
