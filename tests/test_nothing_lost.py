"""What trainers share so that nothing is lost: full disks, more than one process, strategies that are refused."""

import argparse
import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import ROOT, reset_accelerate
from hypothesis import given
from hypothesis import strategies as st
from processes import one_process, two_processes
from safetensors.torch import load_file

from sketch_perceptual.cli import arguments
from sketch_perceptual.errors import InputError
from sketch_perceptual.training import checkpoints, startup

OPTIONS = """--pretrained_model_name_or_path {sd} --train_data_dir {drawings} --resolution 32 --perceptual_loss pixel
    --train_batch_size 1 --gradient_accumulation_steps 2 --seed 0 --report_to none --mixed_precision no --random_flip
    --lr_scheduler cosine --lr_warmup_steps 0 --learning_rate 1e-2 --perceptual_min_snr 0 --max_train_steps 4"""
WEIGHTS = "pytorch_lora_weights.safetensors"


def weights(folder):
    return load_file(folder / WEIGHTS)


FULL = """
import resource, sys
import train_lora_sketch as script
from sketch_perceptual.cli import entry

save, files = script.Adapter.save, []
def full(adapter, folder):
    files.append(folder)
    if str(len(files)) == sys.argv[1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    save(adapter, folder)
script.Adapter.save = full
if sys.argv[1] == "export":
    finish = script.finish
    def full_finish(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        return finish(*args)
    script.finish = full_finish
entry.run(script.main, script.parse_args(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_checkpoint(tiny_sd, drawings, tmp_path):
    (tmp_path / "driver.py").write_text(FULL)
    options = OPTIONS.format(sd=tiny_sd, drawings=drawings).split()
    options += ["--checkpointing_steps", "1", "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "latest"]
    options += ["--feature_dir", tmp_path / "features"]
    done = one_process(tmp_path / "driver.py", "3", *options)
    assert done.returncode == 2, done.stderr
    assert "checkpoint-3 could not be written: " in done.stderr
    assert "--resume_from_checkpoint latest" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in checkpoints.find_checkpoints(tmp_path / "out")] == ["checkpoint-1", "checkpoint-2"]
    done = one_process(tmp_path / "driver.py", "export", *options)
    assert done.returncode == 2, done.stderr
    assert os.strerror(27) in done.stderr
    assert "Traceback" not in done.stderr
    assert len(checkpoints.find_checkpoints(tmp_path / "out")) == 4


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(tiny_sd, drawings, tmp_path):
    """From the middle of an epoch: 7 images on 2 processes are 4 batches, 2 optimizer steps."""
    options = [*OPTIONS.format(sd=tiny_sd, drawings=drawings).split(), "--checkpointing_steps", "3"]
    options += ["--feature_dir", str(tmp_path / "features")]
    for more in ([], ["--resume_from_checkpoint", "latest"]):
        done = two_processes(ROOT / "train_lora_sketch.py", *options, *more, "--output_dir", str(tmp_path / "out"))
        assert done.returncode == 0, done.stderr[-3000:]
        if not more:
            straight = weights(tmp_path / "out")
            (tmp_path / "out" / WEIGHTS).unlink()
            assert [path.name for path in checkpoints.find_checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    resumed = weights(tmp_path / "out")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM])
def test_strategies_that_shard_are_refused_at_the_start(kind, monkeypatch, tmp_path):
    reset_accelerate()
    monkeypatch.setattr(startup, "Accelerator", lambda **options: SimpleNamespace(distributed_type=kind))
    args = argparse.Namespace(report_to="none", hub_token=None, output_dir=str(tmp_path), logging_dir="logs")
    args.gradient_accumulation_steps, args.mixed_precision = 1, None
    with pytest.raises(InputError, match=f"{kind.value} .*accelerate launch --multi_gpu"):
        startup.start(args)


@pytest.mark.parametrize(("limit", "fits"), [(None, False), (3, True)])
def test_space_for_all_that_stays_is_asked_for(limit, fits, monkeypatch, tmp_path):
    monkeypatch.setattr(startup.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e9))
    if fits:
        assert startup.check_space(tmp_path, 10, limit, 1e9, 1e9) == "5.0 GB will be written, 5 are free"
    else:
        with pytest.raises(InputError, match=r"`output_dir` .*5\.0 .* 11\.0.*`checkpoints_total_limit`"):
            startup.check_space(tmp_path, 10, limit, 1e9, 1e9)


@given(st.integers(-5, 5), st.one_of(st.integers(), st.floats(), st.text()))
def test_numbers_are_taken_if_they_are_finite_and_large_enough(minimum, value):
    for kind in (int, float):
        try:
            expected = kind(str(value))
        except ValueError:
            continue  # argparse says so
        if expected - expected == 0 and expected >= minimum:
            assert arguments.at_least(minimum, kind)(str(value)) == expected
        else:
            with pytest.raises(argparse.ArgumentTypeError, match=f"must be a number of at least {minimum}"):
                arguments.at_least(minimum, kind)(str(value))
