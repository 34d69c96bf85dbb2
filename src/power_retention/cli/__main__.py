"""``python -m power_retention.cli``, for launchers that start modules: torchrun, srun."""

from power_retention.cli import main

main()
