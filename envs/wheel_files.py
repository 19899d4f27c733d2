"""Puts the workflow into a wheel, where commands find their costs and settings (a hook of hatchling)."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# What a checkout has beside src/.
WORKFLOW = ("Snakefile", "config", "local", "rules", "scripts", "slurm")


class WheelFiles(BuildHookInterface[Any]):
    """Adds files to the wheel that is built."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Copy the workflow to where :data:`detrojan.registry.CHECKOUT` looks for it.

        An editable install (``version`` is then another) uses the checkout's own.
        """
        if version == "standard":
            build_data["force_include"] |= {name: f"detrojan/_checkout/{name}" for name in WORKFLOW}
