"""A training run in its folder, with checkpoints and resuming, for every trainer."""

import difflib
import json
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..cli import interruption
from ..errors import InputError, first_line
from .checkpoints import (
    OPTIMIZER_FILE,
    choose,
    find_checkpoints,
    flatten,
    set_learning_rate,
    unflatten,
    write_checkpoint,
)
from .distributed import on_main
from .lock import lock_folder
from .steps import Meter, Steps
from .trackers import keep_training

logger = get_logger(__name__, log_level="INFO")


class Run:
    """One training run in one folder, which can be interrupted and resumed.

    Independent of networks, losses and data sets: `begin` is given the functions that save and load the model. Every
    process must make the same calls; the main one writes.

    Args:
        output_dir: locked until this process ends.
        options: options that a resumed run must share, see `identity_of`; `seed` may be None.
        resume_from: a checkpoint, its name in `output_dir`, or "latest".
        resume_with: names of options that may differ from the saved run; the new values take effect and are recorded.
        fixed: names of `options` that a resumed run cannot change, since the saved weights would not fit.
        total_limit: number of checkpoints to keep.

    Attributes:
        seed: given, saved or, for a new run without one, random.
        state: the trainer's own state, as JSON, saved with each checkpoint.
        changes: options changed by resumed runs, each with its step.
        card_data: license and data set, for the model card.
        hub_model_id: the repository that the result is pushed to, or the one that the options name.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | Path,
        options: dict,
        *,
        resume_from: str | None = None,
        resume_with: list[str] | None = None,
        fixed: Iterable[str] = (),
        total_limit: int | None = None,
    ):
        self.accelerator, self.folder, self.total_limit = accelerator, Path(output_dir), total_limit
        self.resume_with, self.identity, self.state, self.changes = resume_with or [], {}, {}, []
        if resume_with and resume_from is None:
            raise InputError("`resume_with` is for a resumed run: add `resume_from_checkpoint`")
        self.fixed = set(fixed)
        if shapes := sorted(self.fixed.intersection(self.resume_with)):
            raise InputError(f"`resume_with`: {', '.join(shapes)} cannot change: the saved weights would not fit")
        self.checkpoint, self.saved = on_main(accelerator, self._open, resume_from)
        if self.saved:
            self.state = self.saved["state"]
            self._check_names(set(self.saved["identity"]) | set(options))
        self.hub_model_id: str | None = None
        self.card_data: dict = {}
        self._last_saved: int | None = None
        self._stepping: int | None = None  # the step whose update of the weights has begun
        seed = options.get("seed")
        if seed is None:
            seed = self.saved["identity"].get("seed") if self.saved else secrets.randbelow(2**31)
            (seed,) = broadcast_object_list([seed])
        self.seed: int = seed
        self.settle(**options | {"seed": seed})

    def _check_names(self, known: set[str]) -> None:
        """InputError for a name in `resume_with` that is not compared on resume."""
        if unknown := sorted(set(self.resume_with) - known):
            near = difflib.get_close_matches(unknown[0], known - self.fixed, 1)
            hint = f"did you mean {near[0]}?" if near else f"Choose from {', '.join(sorted(known - self.fixed))}"
            raise InputError(
                f"`resume_with` {' '.join(unknown)}: not compared on resume, so there is nothing to override; {hint}"
            )

    def settle(self, **identity) -> None:
        """Add to the identity of the run; InputError if the saved run differs."""
        new = json.loads(json.dumps(identity))
        self.identity |= new
        if not self.saved:
            return
        saved = self.saved["identity"]
        different = {name: (saved[name], value) for name, value in new.items() if saved.get(name, value) != value}
        refused = {name: values for name, values in different.items() if name not in self.resume_with}
        if refused:
            lines = [f"{name} was {old!r}, is {now!r}" for name, (old, now) in refused.items()]
            advice = f"To continue with the new values: `resume_with` {' '.join([*self.resume_with, *refused])}"
            if shapes := [name for name in refused if name in self.fixed]:
                advice = f"{', '.join(shapes)} cannot change: the saved weights would not fit"
            raise InputError(f"{self.checkpoint} belongs to another run: {'; '.join(lines)}. {advice}")
        for name, (old, now) in different.items():
            logger.warning(f"resumed with {name}={now!r} instead of {old!r}")
            self.changes.append({"step": self.saved["step"], "name": name, "from": old, "to": now})

    def begin(
        self,
        steps: Steps,
        meter: Meter,
        optimizer: torch.optim.Optimizer | AcceleratedOptimizer,
        save_model: Callable[[Path], None],
        load_model: Callable[[Path], None],
        lr_scheduler: torch.optim.lr_scheduler.LambdaLR | None = None,
    ) -> None:
        """Load the checkpoint, if there is one, and defer signals to the end of a step.

        `save_model` writes the trained weights into a folder, `load_model` reads them from it. `optimizer` may be
        wrapped by accelerate.
        """
        self.steps, self.meter, self.save_model = steps, meter, save_model
        self.lr_scheduler = lr_scheduler
        self._prepared_optimizer = optimizer
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
        self.optimizer.register_step_pre_hook(self._note_update)
        if self.saved:
            if self.saved["step"] > steps.total:
                raise InputError(
                    f"{self.checkpoint} is past the end: this run has {steps.total} steps; see `max_train_steps`"
                )
            try:
                load_model(self.checkpoint)
                self._load_optimizer()
            except (RuntimeError, ValueError, KeyError, IndexError) as error:
                raise InputError(
                    f"{self.checkpoint} does not fit the model of this run ({first_line(error)}): options that change"
                    " the shape or the number of weights must not change"
                ) from error
            steps.go_to(self.saved["step"])
            meter.skipped = self.saved["skipped_steps"]
            meter.epoch = self.saved["epoch"]
            self.changes = self.saved["changes"] + self.changes
            if lr_scheduler is not None:
                set_learning_rate(lr_scheduler, steps.done)
            logger.info(f"resumed from {self.checkpoint}")
        interruption.install()
        interruption.defer()

    def optimize(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> dict[str, float]:
        """Take an optimizer step with gradients clipped to `max_norm`; return the sums of `Meter.read`."""
        grad_norm = self.accelerator.clip_grad_norm_(parameters, max_norm)
        self.meter.close(self.steps.done, grad_norm)
        totals = self.meter.read()  # first: a loss that is not finite must not reach the optimizer
        if self.meter.may_step():
            self._prepared_optimizer.step()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self._prepared_optimizer.zero_grad()
        return totals

    def log(self, logs: dict[str, float]) -> None:
        """Send metrics to the progress bar and the trackers."""
        self.steps.show(logs)
        with keep_training(self.accelerator):
            self.accelerator.log(logs, self.steps.done)

    def close(self) -> None:
        """Close the trackers and the process group."""
        try:
            self.accelerator.end_training()
        except OSError as error:
            logger.warning(f"the trackers could not be closed: {first_line(error)}")

    def stopped(self) -> int:
        """Return the signal that any of the processes received, or 0."""
        number = interruption.received()
        if self.accelerator.num_processes > 1:
            numbers = self.accelerator.gather(torch.tensor([number], device=self.accelerator.device))
            number = int(numbers.max())
        return number

    def end_step(self, save: bool, stopped: int | None = None) -> None:
        """Save if `save` is set; save and exit if a process received a signal, `stopped` if it is known."""
        stopped = self.stopped() if stopped is None else stopped
        if save or stopped:
            self.save()
        if stopped:
            self._exit(stopped)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Wrap the training loop: if an error ends it, the last whole step is saved."""
        try:
            yield
        except Exception:
            self._rescue()
            raise

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Wrap the code after the last step: if anything goes wrong there, a checkpoint is saved."""
        interruption.defer(False)
        try:
            self.check_weights()
            yield
        except BaseException as error:
            interruption.defer()
            self._rescue()
            if isinstance(error, interruption.Interrupted):
                self._exit(error.number, wait=False)
            raise

    def _rescue(self) -> None:
        """Save the last whole step unless it is saved already; log a warning if that fails."""
        step = self.steps.done
        if self._last_saved == step:
            return
        if self._stepping == step:
            logger.warning(f"the weight update of step {step + 1} was not finished and is not saved")
            return
        try:
            if self.meter.steps:
                with suppress(FloatingPointError):
                    self.meter.read()
            self.save()
        except FloatingPointError:  # of `check_weights`: the weights are not worth saving
            pass
        except Exception as error:  # must not hide the original error
            logger.warning(f"no checkpoint of step {step}: {first_line(error)}")

    def _note_update(self, *_) -> None:
        self._stepping = self.steps.done

    def check_weights(self) -> None:
        """Raise FloatingPointError if a trained weight is not finite, or if all steps of the run were skipped."""
        if self.steps.at_end and self.meter.skipped >= self.steps.total:
            raise FloatingPointError(
                f"all {self.steps.total} steps were skipped, since their loss or gradient was not finite: nothing was"
                " trained. Lower `learning_rate` or a weight of the loss, or use `mixed_precision` bf16"
            )
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        if torch.stack([weight.detach().isfinite().all() for weight in weights]).all():
            return
        last = find_checkpoints(self.folder)
        where = f"the last checkpoint, {last[-1]}, is good" if last else "there is no checkpoint"
        raise FloatingPointError(
            f"after step {self.steps.done} weights are not finite and are not saved; {where}. Lower `learning_rate`"
        )

    def record(self) -> dict:
        """Return the options for the model card (unset ones left out), and what was changed on resume."""
        changes = [f"{one['name']} from {one['from']} to {one['to']} after step {one['step']}" for one in self.changes]
        options = {name: value for name, value in self.identity.items() if value is not None and value is not False}
        return options | ({"changed": "; ".join(changes)} if changes else {})

    def save(self) -> Path:
        """Write `checkpoint-N`, and delete the oldest one only when it is complete."""
        final = self.folder / f"checkpoint-{self.steps.done}"
        self._last_saved = self.steps.done
        self.check_weights()
        if not self.accelerator.is_main_process:
            return final
        try:
            self._write(final)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(
                f"{final} could not be written: {first_line(error)}. Older checkpoints are intact: free some space and"
                " continue with `resume_from_checkpoint` latest"
            ) from error
        if self.total_limit is not None:
            others = [path for path in find_checkpoints(self.folder) if path != final]
            for old in others[: max(0, len(others) + 1 - self.total_limit)]:
                shutil.rmtree(old)
        logger.info(f"saved {final}")
        return final

    def _write(self, final: Path) -> None:
        tensors, numbers = flatten(self.optimizer.state_dict()["state"])
        scaler = self.accelerator.scaler
        state = {
            "step": self.steps.done,
            "skipped_steps": self.meter.skipped,
            "identity": self.identity,
            "changes": self.changes,
            "state": self.state,
            "epoch": self.meter.epoch,
            "optimizer": numbers,
            "scaler": None if scaler is None else scaler.state_dict(),
        }

        def write_weights(folder: Path) -> None:
            self.save_model(folder)
            save_file(tensors, folder / OPTIMIZER_FILE)

        write_checkpoint(final, write_weights, state)

    def _load_optimizer(self) -> None:
        state = unflatten(load_file(self.checkpoint / OPTIMIZER_FILE), self.saved["optimizer"])
        groups = self.optimizer.state_dict()["param_groups"]  # of this run, whose learning rate may differ
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for weight, values in self.optimizer.state.items():
            for name, value in values.items():
                if torch.is_tensor(value) and value.shape == weight.shape:  # fused optimizers need its layout
                    values[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
        if self.accelerator.scaler is not None and self.saved["scaler"]:
            self.accelerator.scaler.load_state_dict(self.saved["scaler"])

    def _open(self, resume_from: str | None) -> tuple[Path | None, dict | None]:
        lock_folder(self.folder)
        return choose(self.folder, resume_from)

    def _exit(self, number: int, wait: bool = True) -> None:
        logger.warning(f"interrupted after step {self.steps.done}; continue with `resume_from_checkpoint` latest")
        if wait:
            self.accelerator.wait_for_everyone()  # the first to exit ends the others, which may still be writing
            self.close()
        sys.exit(128 + number)
