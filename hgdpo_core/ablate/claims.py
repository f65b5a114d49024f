"""The paper's trends, each as one number with its interval, and what that interval allows to say."""

from dataclasses import dataclass, replace

from hgdpo_core.ablate.arms import Arm, base_arm, format_lambda
from hgdpo_core.ablate.estimates import scaled
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
    """None: either side will do."""

    @property
    def verdict(self) -> str:
        """holds, opposite, or not shown: the interval lies on the paper's side of 0, on the other, or holds 0."""
        low, high = self.estimate.ci_low, self.estimate.ci_high
        if low is None or high is None or low <= 0 <= high:
            return "not shown"
        return "holds" if self.should_be_above_zero in (None, low > 0) else "opposite"


def judge_claims(results: Results) -> list[Claim]:
    """Every trend whose arms were measured."""
    config, prompts = results.ablation.run.config, len(results.ablation.run.prompts.prompts)
    claims: list[Claim] = []
    for world in results.ablation.settings.worlds:
        whole = base_arm(config, prompts, world)
        claims += [*_data_claims(results, whole), *_colour_claims(results, whole)]
    return claims


def _data_claims(results: Results, whole: Arm) -> list[Claim]:
    """Win rates by each judge, in percentage points: the most against the least of each table."""
    rows = {table.number: [row.arm for row in table.rows] for table in results.ablation.tables
            if table.world == whole.world}
    sizes = [arm for arm in rows.get("3", ()) if arm == replace(whole, pool_size=arm.pool_size,
                                                                 loser_rank=arm.pool_size)]
    pairs = [("a larger pool helps", sizes, "pool_size", "N"),
             ("a worse loser helps", rows.get("5", []), "loser_rank", "loser rank"),
             ("more triplets help", rows.get("6", []), "prompts", "prompts")]
    claims = []
    for text, arms, name, word in pairs:
        least, most = (choose(arms, key=lambda arm: getattr(arm, name), default=None) for choose in (min, max))
        if least is not None and most is not None and least != most:
            measured = f"win rate at {word} {getattr(most, name)} minus at {getattr(least, name)}"
            claims += _win_rate_claims(results, text, measured, most, least, True)
    return claims


def _colour_claims(results: Results, whole: Arm) -> list[Claim]:
    """What the paper says of colours, and of what it costs to keep them."""
    arms = [row.arm for table in results.ablation.tables if table.number == "2" and table.world == whole.world
            for row in table.rows]
    claims = []
    if arms:
        claims.append(Claim(whole.world, "plain DPO shifts colours", "red minus blue, tuned minus target",
                            "levels of 255", results.colour(whole, "warmth"), None))
    for arm in arms:
        if arm == replace(whole, latent_normalisation=True):
            claims.append(_colour_claim(results, "LAN removes colour shift", "LAN", arm, whole))
        elif arm == replace(whole, lambda_stat=arm.lambda_stat) and arm != whole:
            name = f"SML (lambda {format_lambda(arm.lambda_stat)})"
            claims += [_colour_claim(results, "SML removes colour shift", name, arm, whole),
                       *_win_rate_claims(results, "SML costs some of the win rate",
                                         f"win rate with {name} minus without", arm, whole, False)]
        elif arm == replace(whole, beta=arm.beta) and arm.beta > whole.beta:
            name = f"beta x{arm.beta / whole.beta:g}"
            claims += [_colour_claim(results, "a larger beta shifts colours less", name, arm, whole),
                       *_win_rate_claims(results, "a larger beta costs much of the win rate",
                                         f"win rate with {name} minus without", arm, whole, False)]
    return claims


def _colour_claim(results: Results, text: str, name: str, arm: Arm, whole: Arm) -> Claim:
    return Claim(arm.world, text, f"how far the mean colour moved in RGB, with {name} minus without", "levels of 255",
                 results.colour_gap(arm, whole, "distance"), False)


def _win_rate_claims(results: Results, text: str, measured: str, arm: Arm, other: Arm, above: bool) -> list[Claim]:
    return [Claim(arm.world, text, f"{measured}, by {scorer}", "percentage points",
                  scaled(results.win_rate_gap(arm, other, scorer), 100), above)
            for scorer in results.records[arm][0].win_rate]
