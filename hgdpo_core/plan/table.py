"""A plan: one row per stage, and the whole as a printed table."""

from pydantic import BaseModel, ConfigDict, computed_field

from hgdpo_core.rendering.tables import Table


class StagePlan(BaseModel):
    """The plan of one stage. Units are images, prompts, pairs or steps; `folder` is "" if its id is not known yet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    unit: str
    total: int
    missing: int
    shards: int
    missing_shards: int
    bytes_found: int
    bytes_missing: int
    seconds: float | None
    """Estimated, of the missing work on one device; None without a measurement."""
    basis: str
    """The source of `seconds`; "" if nothing is missing or no time is known."""
    folder: str = ""
    note: str = ""


class RunPlan(BaseModel):
    """All stages of one run in their order. Nothing is made."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    root: str
    device: str
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...]

    @computed_field
    @property
    def hours(self) -> float | None:
        """Estimated, of the missing work on one device of this kind; None if that of a stage is not known."""
        seconds = [stage.seconds for stage in self.stages]
        return None if None in seconds else sum(filter(None, seconds)) / 3600

    @computed_field
    @property
    def bytes_missing(self) -> int:
        """What the run would add to the store."""
        return sum(stage.bytes_missing for stage in self.stages)

    @computed_field
    @property
    def bytes_found(self) -> int:
        """What already exists there."""
        return sum(stage.bytes_found for stage in self.stages)


def describe(plan: RunPlan) -> str:
    """The plan as a printed table."""
    columns = ("stage", "to make", "existing", "shards to make", "to store", "time", "estimated from")
    rows = []
    for stage in plan.stages:
        existing = f"{stage.total - stage.missing:,}" if stage.folder else "?"
        shards = f"{stage.missing_shards:,} of {stage.shards:,}" if stage.shards else ""
        rows.append([stage.stage, f"{stage.missing:,} {stage.unit}", existing, shards,
                     readable_bytes(stage.bytes_missing), readable_time(stage.seconds), stage.basis])
    rows.append(["all", "", "", "", readable_bytes(plan.bytes_missing), readable_hours(plan), f"on {plan.device}"])
    notes = [f"- {note}" for note in (*plan.notes, *dict.fromkeys(stage.note for stage in plan.stages if stage.note))]
    head = f"Plan of {plan.run_id} in {plan.root} (nothing was made)"
    return "\n".join([head, "", Table(columns, rows).text(), "", *notes])


def readable_hours(plan: RunPlan) -> str:
    """The total time of the plan, as far as it is known."""
    known = sum(stage.seconds or 0.0 for stage in plan.stages)
    if plan.hours is None:
        return f"{readable_time(known)} + ?" if known else "?"
    return readable_time(known)


def readable_time(seconds: float | None) -> str:
    """In two digits or so: 0.4 s, 40 s, 12 min, 3.5 h, 1,280 h, or ? for None."""
    if seconds is None:
        return "?"
    if 0 < seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 100 else f"{hours:,.0f} h"


def readable_bytes(count: float) -> str:
    """In decimal units: 0 B, 12 kB, 2.3 TB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.1f} {unit}" if 0 < count < 10 and unit != "B" else f"{count:,.0f} {unit}"
