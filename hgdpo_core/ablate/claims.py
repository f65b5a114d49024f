"""The paper's trends: one number with its interval for each, and the verdict that follows from the interval."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hgdpo_core.ablate.arms import Arm, PlannedTable, TableName, base_arm, format_lambda
from hgdpo_core.ablate.result import Results
from hgdpo_core.ablate.settings import World
from hgdpo_core.statistics.intervals import Estimate


@dataclass(frozen=True)
class Claim:
    """A trend: the paper's words, what was measured for it, and the verdict."""

    world: World
    text: str
    measured: str
    unit: str
    estimate: Estimate
    should_be_above_zero: bool | None
    """None: a change to either side."""

    @property
    def verdict(self) -> str:
        """"holds", "opposite" or "not shown": the interval is on the paper's side of 0, on the other, or contains 0."""
        low, high = self.estimate.ci_low, self.estimate.ci_high
        if low is None or high is None or low <= 0 <= high:
            return "not shown"
        return "holds" if self.should_be_above_zero in (None, low > 0) else "opposite"


def evaluate_claims(results: Results) -> list[Claim]:
    """Every trend whose arms were measured."""
    config, prompts = results.ablation.run.config, len(results.ablation.run.prompts.prompts)
    claims: list[Claim] = []
    for world in results.ablation.settings.worlds:
        whole = base_arm(config, prompts, world)
        arms: dict[TableName, list[Arm]] = {
            table.number: [row.arm for row in table.rows] for table in results.ablation.tables if table.world == world}
        claims += [*_data_claims(results, whole, arms), *_colour_claims(results, whole, arms.get("2", []))]
    return [*claims, *(claim for table in results.ablation.tables if table.number == "1"
                       for claim in _baseline_claims(results, table))]


def _baseline_claims(results: Results, planned: PlannedTable) -> Iterator[Claim]:
    """HG-DPO is better than each baseline: win rates against it, in percentage points above one half."""
    ours, *others = planned.rows
    for row in others:
        if row.arm.data in ("foreign_pool", "labelled"):
            continue  # a control is no claim
        for scorer in results.scorers(planned):
            above = results.win_rate_against(ours.arm, row.arm, scorer).scaled(100).shifted(-50)
            yield Claim(planned.world, f"HG-DPO is better than {row.label}",
                        f"win rate of HG-DPO against it minus 50, by {scorer}", "percentage points", above, True)



def _data_claims(results: Results, whole: Arm, arms: Mapping[TableName, list[Arm]]) -> Iterator[Claim]:
    """Win rates by each scorer, in percentage points: the largest value of each table against the smallest."""
    sizes = [arm for arm in arms.get("3", []) if arm == replace(whole, pool_size=arm.pool_size,
                                                                 loser_rank=arm.pool_size)]
    for text, compared, name, word in (("a larger pool helps", sizes, "pool_size", "N"),
                                       ("a worse loser helps", arms.get("5", []), "loser_rank", "loser rank"),
                                       ("more triplets help", arms.get("6", []), "prompts", "prompts")):
        ordered = sorted(compared, key=operator.attrgetter(name))
        if ordered and ordered[0] != ordered[-1]:
            least, most = ordered[0], ordered[-1]
            measured = f"win rate at {word} {getattr(most, name)} minus at {getattr(least, name)}"
            yield from _win_rate_claims(results, text, measured, most, least, True)


def _colour_claims(results: Results, whole: Arm, arms: Sequence[Arm]) -> Iterator[Claim]:
    """The paper's claims about colours, and about the cost of keeping them."""
    if arms:
        yield Claim(whole.world, "plain DPO shifts colours", "red minus blue, tuned minus target", "levels of 255",
                    results.colour(whole, "warmth"), None)
    for arm in arms:
        if arm == replace(whole, latent_normalisation=True):
            shift, cost, name = "LAN removes colour shift", None, "LAN"
        elif arm == replace(whole, lambda_stat=arm.lambda_stat) and arm != whole:
            shift, cost = "SML removes colour shift", "SML costs some of the win rate"
            name = f"SML (lambda {format_lambda(arm.lambda_stat)})"
        elif arm == replace(whole, beta=arm.beta) and arm.beta > whole.beta:
            shift, cost = "a larger beta shifts colours less", "a larger beta costs much of the win rate"
            name = f"beta x{arm.beta / whole.beta:g}"
        else:
            continue
        yield Claim(arm.world, shift, f"how far the mean colour moved in RGB, with {name} minus without",
                    "levels of 255", results.colour_gap(arm, whole, "distance"), False)
        if cost is not None:
            yield from _win_rate_claims(results, cost, f"win rate with {name} minus without", arm, whole, False)


def _win_rate_claims(results: Results, text: str, measured: str, arm: Arm, other: Arm, above: bool) -> Iterator[Claim]:
    for scorer in results.records[arm][0].win_rate:
        yield Claim(arm.world, text, f"{measured}, by {scorer}", "percentage points",
                    results.win_rate_gap(arm, other, scorer).scaled(100), above)
