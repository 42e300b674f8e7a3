"""What a model takes on devices that are not here: memory, collectives, and the speed at best."""

from qjax.planning.collectives import planned_collectives
from qjax.planning.planner import Plan, plan

__all__ = ["Plan", "plan", "planned_collectives"]
