"""One small training, by the parts that all trainers share: saved, found, verified, resumed, interrupted."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, reset_accelerate
from safetensors.torch import load_file, save_file

from sketch_perceptual.cli import interruption
from sketch_perceptual.data.loaders import EpochSampler
from sketch_perceptual.errors import InputError
from sketch_perceptual.training import checkpoints
from sketch_perceptual.training.checkpoints import STATE_FILE, find_checkpoints
from sketch_perceptual.training.lock import unlock_folder
from sketch_perceptual.training.run import Run
from sketch_perceptual.training.steps import Meter, Steps, loader_batches

OPTIONS = {"seed": 0, "learning_rate": 0.1, "betas": [0.9, 0.99]}


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, key):
        return torch.tensor([float(key[1]), float(key[0])])


@pytest.fixture
def train(tmp_path, signals):
    """Trains two weights on eleven rows, four epochs of six batches; returns them and the run."""

    def train(
        total=None,
        accumulation=1,
        save_every=3,
        folder="out",
        data="d",
        at_step=None,
        limit=None,
        fail=None,
        **options,
    ):
        reset_accelerate()
        accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
        resume = {name: options.pop(name) for name in ("resume_from", "resume_with") if name in options}
        options = OPTIONS | options
        try:
            run = Run(accelerator, tmp_path / folder, options, fixed=["rank"], total_limit=limit, **resume)
            run.settle(data=data)
            torch.manual_seed(run.seed)
            model = torch.nn.Linear(2, 1)
            sampler = EpochSampler(11, run.seed)
            loader = torch.utils.data.DataLoader(Numbers(), 2, sampler=sampler)
            optimizer = torch.optim.Adam(model.parameters(), options["learning_rate"], betas=options["betas"])
            lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            model, prepared, loader = accelerator.prepare(model, optimizer, loader)
            batches = loader_batches(accelerator, loader, sampler)
            steps = Steps(
                accelerator, batches, len(loader), seed=run.seed, total=total, epochs=4, accumulation=accumulation
            )
            meter = Meter(accelerator)

            def save(path):
                save_file(model.state_dict(), path / "model.safetensors")

            def load(path):
                model.load_state_dict(load_file(path / "model.safetensors"))

            run.begin(steps, meter, optimizer, save, load, lr_scheduler)
            run.state.setdefault("losses", [])
            with run.training():
                for batch in steps:
                    with accelerator.accumulate(model):
                        if fail == ("forward", steps.done):
                            raise RuntimeError("forward fails")
                        if fail == ("update", steps.done):
                            optimizer.register_step_post_hook(update_fails)
                        loss = (model(batch / 10) + torch.rand(1, generator=steps.rng("noise"))).square().squeeze(1)
                        accelerator.backward(loss.mean())
                        meter.add([str(row) for row in batch[:, 0]], {"loss": loss})
                        if not accelerator.sync_gradients:
                            continue
                        meter.close(steps.done, accelerator.clip_grad_norm_(model.parameters(), 1.0))
                        run.state["losses"].append(meter.read()["loss"])
                        prepared.step()
                        lr_scheduler.step()
                        prepared.zero_grad()
                    steps.advance()
                    if at_step:
                        at_step(steps.done, model)
                    run.end_step(save=steps.done % save_every == 0)
            with run.finishing():
                if at_step:
                    at_step("finish", model)
            return [weight.clone() for weight in model.state_dict().values()], run
        finally:
            interruption.defer(False)
            unlock_folder(tmp_path / folder)

    return train


def update_fails(*_):
    raise RuntimeError("update fails")


def same(one, other):
    return all(map(torch.equal, one[0], other[0])) and one[1].state == other[1].state


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("stop", [2, 3, 5, 6, 11])
def test_a_longer_run_continues_exactly(train, stop, accumulation):
    straight = train(12, accumulation, folder="straight")
    train(stop, accumulation, save_every=1)
    assert same(train(12, accumulation, resume_from="latest"), straight)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_error_in_the_loop_saves_the_last_whole_step(train, accumulation):
    straight = train(8, accumulation, folder="straight")
    with pytest.raises(RuntimeError, match="forward fails"):
        train(8, accumulation, save_every=99, fail=("forward", 5))
    assert same(train(8, accumulation, resume_from="latest"), straight)
    assert straight[1].meter.epoch == train(8, accumulation, folder="straight", resume_from="latest")[1].meter.epoch


def test_half_an_update_is_not_saved(train, tmp_path, caplog):
    with pytest.raises(RuntimeError, match="update fails"):
        train(8, save_every=4, fail=("update", 5))
    assert [path.name for path in find_checkpoints(tmp_path / "out")] == ["checkpoint-4"]
    assert "step 6 " in caplog.text


def test_an_error_after_a_step_saves_that_step(train, tmp_path):
    def fail(step, model):
        if step == 5:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        train(8, save_every=99, at_step=fail)
    assert [path.name for path in find_checkpoints(tmp_path / "out")] == ["checkpoint-5"]


@pytest.mark.parametrize("resume", [{}, {"resume_from": "latest"}])
def test_checkpoints_of_other_programs_are_left_alone(train, tmp_path, resume):
    theirs = tmp_path / "out" / "checkpoint-3" / "optimizer.bin"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"x")
    with pytest.raises(InputError, match=r"checkpoint-3 .*`output_dir`"):
        train(6, **resume)
    assert theirs.read_bytes() == b"x"


def test_options_that_change_shapes_are_never_offered(train):
    train(3, rank=4)
    with pytest.raises(InputError, match=r"rank was 4, is 8.*rank") as refused:
        train(6, resume_from="latest", rank=8)
    assert "resume_with" not in str(refused.value)
    with pytest.raises(InputError, match="`resume_with`: rank"):
        train(6, resume_from="latest", rank=8, resume_with=["rank"])


def test_a_run_whose_steps_were_all_skipped_is_no_success():
    run = Run.__new__(Run)
    run.steps, run.meter = SimpleNamespace(at_end=True, total=3), SimpleNamespace(skipped=3)
    with pytest.raises(FloatingPointError, match=r"all 3 steps .*`learning_rate`"):
        run.check_weights()


def test_a_run_of_another_length_than_epochs_ends_where_it_should(train):
    run = train(15)[1]
    assert (run.steps.done, run.steps.epochs, run.steps.epoch) == (15, 3, 2)
    assert len(run.state["losses"]) == 15


def test_a_finished_run_resumed_trains_nothing_more(train):
    first = train(6)
    assert same(train(6, resume_from="latest"), first)


CHANGES = [
    ({"learning_rate": 0.2}, "learning_rate was 0.1, is 0.2"),
    ({"betas": [0.8, 0.99]}, r"betas was \[0.9, 0.99\], is \[0.8, 0.99\]"),
    ({"seed": 1}, "seed was 0, is 1"),
    ({"data": "e"}, "data was 'd', is 'e'"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_another_run_is_refused_with_both_values(train, change, message):
    train(3)
    with pytest.raises(InputError, match=message + r".*`resume_with` \w+$"):
        train(6, resume_from="latest", **change)


def test_all_that_differs_is_said_at_once(train):
    train(3)
    with pytest.raises(InputError, match=r"learning_rate was .*; betas was .*`resume_with` learning_rate betas"):
        train(6, resume_from="latest", learning_rate=0.2, betas=[0.8, 0.99])


def test_the_advice_on_what_differs_keeps_what_was_allowed_before(train):
    train(3)
    with pytest.raises(InputError, match=r"`resume_with` learning_rate betas$"):
        train(6, resume_from="latest", resume_with=["learning_rate"], learning_rate=0.2, betas=[0.8, 0.99])


def test_a_step_without_metrics_is_not_logged(train, caplog):
    caplog.set_level("INFO")
    steps = train(3)[1].steps
    steps.show({"gated": 0.0})
    assert "step 3 of 3" not in caplog.text
    steps.show({"train_loss": 0.5})
    assert "step 3 of 3: loss 0.5" in caplog.text


def test_what_is_allowed_takes_effect_and_is_recorded(train):
    train(3)
    kept = train(6, folder="kept")
    changed = train(6, resume_from="latest", resume_with=["learning_rate"], learning_rate=0.2)
    assert not same(changed, kept)
    assert changed[1].optimizer.param_groups[0]["lr"] == pytest.approx(0.2 / 7)
    assert changed[1].changes == [{"step": 3, "name": "learning_rate", "from": 0.1, "to": 0.2}]
    assert changed[1].record()["changed"] == "learning_rate from 0.1 to 0.2 after step 3"
    again = train(9, resume_from="latest", learning_rate=0.2)  # the new value is now the run's
    assert again[1].changes == changed[1].changes


def test_a_name_that_is_nothing_a_run_shares_is_refused(train):
    train(3)
    with pytest.raises(InputError, match=r"`resume_with` rate: .* betas, data, learning_rate, seed"):
        train(6, resume_from="latest", resume_with=["rate"])


def test_a_shorter_run_is_refused(train):
    train(6)
    with pytest.raises(InputError, match=r"checkpoint-6 .* 4 steps.*`max_train_steps`"):
        train(4, resume_from="latest")


def test_an_older_runs_checkpoints_are_not_touched(train):
    run = train(3)[1]
    before = checkpoints.read_checkpoint(run.folder / "checkpoint-3")
    with pytest.raises(InputError, match=r"`output_dir` .*checkpoint-3 .*`resume_from_checkpoint` latest"):
        train(6)
    assert checkpoints.read_checkpoint(run.folder / "checkpoint-3") == before


def test_a_checkpoint_from_elsewhere_goes_on_in_an_unused_folder(train):
    straight = train(6, folder="straight")
    checkpoint = train(3)[1].folder / "checkpoint-3"
    assert same(train(6, folder="elsewhere", resume_from=checkpoint), straight)
    with pytest.raises(InputError, match=r"`output_dir` .*straight .*checkpoint-6 "):
        train(6, folder="straight", resume_from=checkpoint)


def test_results_that_will_be_replaced_are_named(train, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    save_file({}, tmp_path / "out" / "adapter.safetensors")
    train(3)
    assert "adapter.safetensors" in caplog.text


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(path):
    path.write_bytes(b"")


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", STATE_FILE])
@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_flip, os.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(train, tmp_path, caplog, file, damage):
    straight = train(9, folder="straight")
    train(6)
    path = tmp_path / "out" / "checkpoint-6" / file
    damage(path)
    is_complete = (path.parent / STATE_FILE).exists()
    if is_complete:
        with pytest.raises(InputError, match=rf"{file} is (damaged|missing)"):
            train(9, resume_from="checkpoint-6")
    resumed = train(9, resume_from="latest")
    assert same(resumed, straight)
    assert resumed[1].checkpoint.name == "checkpoint-3"
    assert (f"{file} is " in caplog.text) == is_complete


def test_an_older_layout_is_refused_in_a_sentence(train, tmp_path):
    folder = tmp_path / "out" / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / STATE_FILE).write_text(json.dumps({"global_step": 3}, indent=2))
    with pytest.raises(InputError, match=r"checkpoint-3 .*older version"):
        train(6, resume_from="checkpoint-3")


def test_a_replaced_checkpoint_is_never_gone(train, tmp_path, monkeypatch):
    """Whatever the moment at which the process dies while it saves a step again."""
    train(3)
    rename, moments = type(tmp_path).rename, []

    def watch(self, target):
        moments.append([checkpoints.read_checkpoint(path)["step"] for path in find_checkpoints(tmp_path / "out")])
        rename(self, target)
        moments.append([checkpoints.read_checkpoint(path)["step"] for path in find_checkpoints(tmp_path / "out")])

    run = train(3, folder="again")[1]
    run.folder = tmp_path / "out"
    monkeypatch.setattr(type(tmp_path), "rename", watch)
    run.save()
    assert moments == [[3]] * 4
    assert [path.name for path in (tmp_path / "out").iterdir() if "replaced" in path.name] == []


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_a_signal_ends_the_step_and_saves(train, number):
    straight = train(9, folder="straight")
    with pytest.raises(SystemExit) as exit:
        train(9, save_every=9, at_step=lambda step, model: step == 4 and os.kill(os.getpid(), number))
    assert exit.value.code == 128 + number
    assert same(train(9, save_every=9, resume_from="latest"), straight)


def test_a_signal_after_the_last_step_saves_too(train, tmp_path):
    with pytest.raises(SystemExit) as exit:
        train(4, at_step=lambda step, model: step == "finish" and os.kill(os.getpid(), signal.SIGINT))
    assert exit.value.code == 130
    assert find_checkpoints(tmp_path / "out")[-1].name == "checkpoint-4"


def test_whatever_fails_after_the_last_step_costs_no_training(train, tmp_path):
    def fail(step, model):
        if step == "finish":
            raise MemoryError

    with pytest.raises(MemoryError):
        train(4, at_step=fail)
    assert find_checkpoints(tmp_path / "out")[-1].name == "checkpoint-4"


def test_weights_that_are_not_finite_are_never_saved(train, tmp_path):
    def spoil(step, model):
        if step == 5:
            model.weight.data[0, 1] = torch.inf

    with pytest.raises(FloatingPointError, match=r"after step 6 .*not finite.*checkpoint-3.*`learning_rate`"):
        train(9, at_step=spoil)
    assert [path.name for path in find_checkpoints(tmp_path / "out")] == ["checkpoint-3"]


def test_only_the_newest_stay(train, tmp_path):
    train(12, limit=2)
    assert [path.name for path in find_checkpoints(tmp_path / "out")] == ["checkpoint-9", "checkpoint-12"]


def test_a_log_that_cannot_be_written_costs_no_training(train, caplog, monkeypatch):
    run = train(3)[1]

    def full(values, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.accelerator, "log", full)
    run.log({"loss": 1.0})
    assert "No space left on device" in caplog.text


LOCK = """
import sys
from sketch_perceptual.training.lock import lock_folder
lock_folder(sys.argv[1])
print("held", flush=True)
input()
"""


def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(train, tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", LOCK, tmp_path / "out"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"out .*process {other.pid}"):
            train(3)
    finally:
        other.kill()
        other.wait()
    train(3)
