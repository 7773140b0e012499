"""Loads verl without Ray, which its package imports and none of the compared functions uses."""

import sys
from unittest.mock import MagicMock

for name in (
    "ray", "ray.actor", "ray.experimental", "ray.experimental.state", "ray.experimental.state.api", "ray.util",
    "ray.util.placement_group", "ray.util.scheduling_strategies",
):  # fmt: skip
    sys.modules.setdefault(name, MagicMock(name=name))
