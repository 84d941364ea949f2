"""The transforms: a folder a stage, a module a transform; ``default.yaml`` lists them in order.

base -> what a pass is; registry -> the passes by key; pipeline -> running them, one Step each.
"""

from adkit.graph.step import PassInfo
from adkit.passes.base import BuildPass, Context, Pass, PassConfig, Stage
from adkit.passes.registry import all_passes, get_pass, register

__all__ = [
    "BuildPass",
    "Context",
    "Pass",
    "PassConfig",
    "PassInfo",
    "Stage",
    "all_passes",
    "get_pass",
    "register",
]
