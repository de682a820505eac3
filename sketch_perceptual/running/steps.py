"""What one optimizer step did."""

import math

from accelerate.logging import get_logger

logger = get_logger(__name__, log_level="INFO")


class NonFiniteGuard:
    """Counts the optimizer steps whose loss or gradient was not finite, and ends the run after a few in a row.

    `scaled` says that a gradient scaler is at work: it overflows while it settles, and skips those steps by itself.
    """

    def __init__(self, total: int = 0, scaled: bool = False):
        self.total, self.scaled, self.in_a_row = total, scaled, 0
        self.limit = 25 if scaled else 5

    def is_finite(self, step: int, values: list[float], seen: list[tuple]) -> bool:
        """Whether all `values` are finite; if not, names the step and, of `seen`, what this process had in it.

        Args:
            seen: for each batch of the step the images' names, their losses (B,) and, for diffusion, timesteps (B,).
        """
        if all(map(math.isfinite, values)):
            self.in_a_row = 0
            return True
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        rows = [
            " at timestep ".join([name, *map(str, timestep)])
            for names, losses, *timesteps in seen
            for name, loss, *timestep in zip(names, losses.tolist(), *(t.tolist() for t in timesteps), strict=True)
            if not math.isfinite(loss)
        ]
        blame = f"loss of {', '.join(rows)}" if rows else "gradient"
        logger.warning(f"step {step} skipped, not finite: {blame}", main_process_only=False)
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row were not finite, the last at step {step}: {blame}. No such step was"
                " saved. Lower --learning_rate or a weight of the loss, or use --mixed_precision bf16."
            )
        return False
