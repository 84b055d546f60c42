"""The tables of the paired tests."""

from __future__ import annotations

from sdft_lightning.continual.report.comparisons import Comparisons, OfSeed, Pooled
from sdft_lightning.continual.report.tables import NOTHING, Table, p_value, points, seed_count

_SIGNIFICANT = 0.05


def pooled_table(comparisons: Comparisons) -> Table:
    """The tests over seeds."""
    rows = []
    for each in comparisons.pooled:
        low, high = each.interval or (None, None)
        band = "" if low is None or high is None else f"[{points(low)}, {points(high)}]"
        rows.append(
            (
                each.name,
                f"{each.first} less {each.second}",
                points(each.difference),
                band or NOTHING,
                str(each.items),
                seed_count(len(each.seeds), each.expected),
                _same_sign(each),
                p_value(each.p) + ("" if each.exact else " (drawn)"),
                p_value(each.corrected),
                "yes" if each.corrected <= _SIGNIFICANT else "no",
            )
        )
    note = (
        "After the last stage. Sign-flip test and bootstrap draw items, all seeds of an item "
        f"together. Holm's correction is over these {len(rows)} comparisons. “Seeds alike”: seeds "
        "whose own difference has the sign of the mean."
    )
    header = (
        "Measured on",
        "Difference",
        "Points",
        "95 % interval",
        "Items",
        "Seeds",
        "Seeds alike",
        "p",
        "p (Holm)",
        "p (Holm) ≤ 0.05",
    )
    return Table("tests", "Paired tests over all seeds", header, tuple(rows), note, text_columns=2)


def _same_sign(pooled: Pooled) -> str:
    same = sum(d * pooled.difference > 0 for d in pooled.differences)
    return f"{same} of {len(pooled.differences)}"


def by_seed_table(comparisons: Comparisons) -> Table:
    """McNemar's test for each seed."""
    rows = tuple(_by_seed_row(each) for each in comparisons.by_seed)
    note = (
        "McNemar's exact test on the items that only one of the two has right. Holm's correction "
        f"is over these {len(rows)} comparisons. Do not add up the counts of several seeds: they "
        "are of the same items."
    )
    header = (
        "Measured on",
        "Between",
        "Seed",
        "Items",
        "Only first",
        "Only second",
        "p",
        "p (Holm)",
    )
    return Table("mcnemar", "McNemar's test for each seed", header, rows, note, text_columns=2)


def _by_seed_row(each: OfSeed) -> tuple[str, ...]:
    return (
        each.name,
        f"{each.first} and {each.second}",
        str(each.seed),
        str(each.items),
        str(each.only_first),
        str(each.only_second),
        p_value(each.p),
        p_value(each.corrected),
    )
