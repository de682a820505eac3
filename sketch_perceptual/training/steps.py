"""Step counter and loss meter."""

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor
from tqdm.auto import tqdm

from ..cli.interruption import held_back
from ..seeds import generator

logger = get_logger(__name__, log_level="INFO")

# Fits on a line of 80 columns.
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
SHOWN = {"train_loss": "loss", "lr": "rate", "skipped_steps": "skipped"}


class Steps:
    """Iterator over the batches of a run from step `done` on, which determines all other state.

    Args:
        batches: `batches(epoch, first)` yields the batches of an epoch from number `first` on; see `loader_batches`.
        batches_per_epoch: number of batches per process; a list with one number for each epoch if they differ.
        total: number of optimizer steps; default: those of `epochs`.
        accumulation: batches per optimizer step; the last step of an epoch takes what is left.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        batches: Callable[[int, int], Iterable],
        batches_per_epoch: int | list[int],
        *,
        seed: int,
        total: int | None = None,
        epochs: int = 1,
        accumulation: int = 1,
    ):
        self.batches, self.seed, self.accumulation = batches, seed, accumulation
        self.rank, self.shows = accelerator.process_index, accelerator.is_local_main_process
        if isinstance(batches_per_epoch, int):
            per_epoch = math.ceil(batches_per_epoch / accumulation)
            total = epochs * per_epoch if total is None else total
            self.ends = [*range(per_epoch, total, per_epoch), total]
        else:
            self.ends = list(itertools.accumulate(math.ceil(batches / accumulation) for batches in batches_per_epoch))
        self.total, self.epochs = self.ends[-1], len(self.ends)
        self.done = self.epoch = self.number = 0
        self.progress = tqdm(disable=True)  # until the first step

    def __iter__(self) -> Iterator:
        disable = None if self.shows else True  # a log file gets lines instead of a bar
        self.progress = tqdm(total=self.total, initial=self.done, bar_format=BAR, disable=disable)
        while self.done < self.total:
            self.epoch = bisect.bisect(self.ends, self.done)
            start = self.ends[self.epoch - 1] if self.epoch else 0
            first = (self.done - start) * self.accumulation
            for number, batch in enumerate(self.batches(self.epoch, first), first):
                self.number = number
                yield batch
                if self.done >= self.total:
                    break
        self.progress.close()

    def go_to(self, step: int) -> None:
        """Continue after `step`; the last step of an epoch still counts as that epoch."""
        self.done, self.epoch = step, bisect.bisect_left(self.ends, step)

    def rng(self, name: str, *more: int) -> torch.Generator:
        """Return the random generator of this batch and process, independent of what came before."""
        return generator(self.seed, name, *more, self.epoch, self.number, self.rank)

    def advance(self) -> None:
        """Count a finished optimizer step."""
        self.done += 1
        self.progress.update()

    def show(self, logs: dict[str, float]) -> None:
        """Show the main metrics on the progress bar or, without a terminal, in ten lines of the log."""
        shown = {short: f"{logs[name]:.3g}" for name, short in SHOWN.items() if name in logs}
        self.progress.set_postfix(shown, refresh=False)
        is_line = self.done * 10 // self.total > (self.done - 1) * 10 // self.total
        if shown and is_line and self.shows and self.progress.disable:
            metrics = ", ".join(f"{name} {value}" for name, value in shown.items())
            logger.info(f"step {self.done} of {self.total}: {metrics}")

    def due(self, every: int | None) -> bool:
        return every is not None and self.done % every == 0

    @property
    def at_epoch_end(self) -> bool:
        return self.done in self.ends

    @property
    def at_end(self) -> bool:
        return self.done == self.total


def loader_batches(accelerator: Accelerator, loader, sampler) -> Callable[[int, int], Iterable]:
    """Return `batches` for `Steps` from a prepared DataLoader whose `sampler` orders the epoch `sampler.epoch`."""

    def batches(epoch: int, first: int) -> Iterator:
        sampler.epoch = epoch
        iterator = iter(accelerator.skip_first_batches(loader, first) if first else loader)
        with held_back():  # while workers start
            batch = next(iterator)
        yield batch
        yield from iterator

    return batches


class Meter:
    """Sums of the losses since the last reading, kept on the device to avoid a synchronization at each step.

    A step whose loss or gradient is not finite is counted and logged with its images, but not summed; too many in a
    row end the run with a FloatingPointError.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.scaled = accelerator.scaler is not None  # a gradient scaler skips steps by itself until it settles
        self.limit = 25 if self.scaled else 5
        self.skipped = self.in_a_row = 0
        self.was_finite = True
        self.epoch: dict[str, float] = {}  # sums since `start_epoch`, saved with each checkpoint
        self.step_sums: Tensor | int = 0  # of the current, incomplete step
        self.batches: list[tuple] = []
        self.steps: list[tuple] = []

    def add(self, names: list[str], losses: dict[str, Tensor], timesteps: Tensor | None = None) -> None:
        """Add the losses of a batch: the images' names, and (B,) values of each quantity."""
        values = [value.detach().float() for value in losses.values()]
        rows = torch.stack([*values, torch.ones_like(values[0])])
        self.quantities = [*losses, "rows"]
        self.step_sums = self.step_sums + rows.sum(1)
        self.batches.append((names, rows[:-1].sum(0), timesteps))

    def close(self, step: int, grad_norm: Tensor) -> None:
        """Complete an optimizer step, the one after `step` others."""
        assert isinstance(self.step_sums, Tensor), "add comes first"
        grad_norm = torch.as_tensor(grad_norm, device=self.step_sums.device).detach().float()
        self.steps.append((step + 1, torch.cat([self.step_sums, grad_norm[None]]), self.batches))
        self.step_sums, self.batches = 0, []

    def read(self) -> dict[str, float]:
        """Return sums over all processes since the last reading, the number of "rows" and the last "grad_norm".

        Sets `was_finite` for the last step. FloatingPointError if too many steps in a row were not finite.
        """
        table = torch.stack([numbers for _, numbers, _ in self.steps])
        if self.accelerator.num_processes > 1:
            norms = table[:, -1]
            table = torch.cat([self.accelerator.reduce(table[:, :-1].contiguous(), "sum"), norms[:, None]], 1)
        totals = dict.fromkeys(self.quantities, 0.0)
        for numbers, (step, _, batches) in zip(table.tolist(), self.steps, strict=True):
            self.was_finite = all(map(math.isfinite, numbers))
            if self.was_finite:
                self.in_a_row = 0
                totals = {name: total + more for (name, total), more in zip(totals.items(), numbers, strict=False)}
            else:
                self._blame(step, batches)
        self.epoch = {name: self.epoch.get(name, 0.0) + total for name, total in totals.items()}
        totals["grad_norm"] = numbers[-1]
        self.steps = []
        return totals

    def start_epoch(self) -> dict[str, float]:
        """Return the sums of the last epoch and reset them."""
        sums, self.epoch = self.epoch, {}
        return sums

    def may_step(self) -> bool:
        """Return whether the optimizer may take the step that was read last; a gradient scaler decides by itself."""
        return self.was_finite or self.scaled

    def _blame(self, step: int, batches: list[tuple]) -> None:
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        rows = [
            name if timesteps is None else f"{name} at timestep {int(timesteps[row])}"
            for names, losses, timesteps in batches
            for row, (name, loss) in enumerate(zip(names, losses.tolist(), strict=False))
            if not math.isfinite(loss)
        ]
        blame = f"loss of {', '.join(rows)}" if rows else "gradient"
        logger.warning(f"step {step} skipped, not finite: {blame}", main_process_only=False)
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row were not finite, the last at step {step}: {blame}. They did not"
                " change the weights. Lower `learning_rate` or a weight of the loss, or use `mixed_precision` bf16."
            )
