"""A pytest plugin for verl's own test files: before they import, verl's functions become those of compat.verl."""

import stand_ins  # noqa: F401 - before verl
import verl.trainer.ppo.core_algos as core_algos
import verl.utils.torch_functional as torch_functional

import rlhf_fast.compat.verl as ours

replaced = []
for module in (core_algos, torch_functional):
    for name in [name for name in vars(module) if name in vars(ours) and callable(getattr(ours, name))]:
        original = getattr(module, name)
        if getattr(original, "__module__", "").startswith("verl."):
            setattr(module, name, getattr(ours, name))
            replaced.append(name)
            for registry in (core_algos.POLICY_LOSS_REGISTRY, core_algos.ADV_ESTIMATOR_REGISTRY):
                for key in [key for key, function in registry.items() if function is original]:
                    registry[key] = getattr(ours, name)


def pytest_report_header():
    return f"{len(replaced)} of verl's functions replaced by ours"
