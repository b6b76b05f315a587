"""Paged attention on its own: `plan` once a step, `run` once a layer."""

from cupaged.attention.cascade import CascadePlan, SharedPrefix, plan_cascade, run_cascade, shared_prefixes
from cupaged.attention.device_plan import DevicePlanner
from cupaged.attention.kernel import grids_of_device, run
from cupaged.attention.masks import pack_mask
from cupaged.attention.merge import merge_states
from cupaged.attention.planner import Grid, Plan, plan

__all__ = [
    "CascadePlan",
    "DevicePlanner",
    "Grid",
    "Plan",
    "SharedPrefix",
    "grids_of_device",
    "merge_states",
    "pack_mask",
    "plan",
    "plan_cascade",
    "run",
    "run_cascade",
    "shared_prefixes",
]
