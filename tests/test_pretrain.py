"""`python -m fcmae.pretrain` from the outside: real processes, real signals, real torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import make_split, run_module, tiny_run
from PIL import Image
from safetensors.torch import load_file

from fcmae.data.make_shards import main as make_shards
from fcmae.pretraining import finetune_command
from fcmae.settings import PretrainConfig


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def encoder(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "encoder.safetensors")


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Path:
    """A run of 6 steps, uninterrupted."""
    folder = tmp_path_factory.mktemp("finished")
    done = run_module("fcmae.pretrain", *tiny_run(shards), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Done: step 6 of 6" in done.stdout
    assert "python -m finetune.train checkpoint=runs/demo/pretrain" in done.stdout
    return folder / "runs" / "demo" / "pretrain"


def test_a_run_leaves_what_it_promises(finished):
    assert {p.name for p in finished.iterdir()} == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "reconstructions",
        "encoder.safetensors",
    }
    assert [r["step"] for r in records(finished)] == [1, 2, 3, 4, 5, 6]
    assert [r["epoch"] for r in records(finished)] == [0, 0, 0, 1, 1, 1]
    picture = Image.open(finished / "reconstructions" / "step-00000006.png")
    assert picture.width > 200
    reference = timm.create_model(
        "convnextv2_atto", num_classes=0, patch_size=1, dims=(4, 8, 8, 8), depths=(1, 1, 1, 1)
    )
    reference.load_state_dict(encoder(finished), strict=True)


def test_starting_a_finished_run_again_changes_nothing(finished, shards):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("checkpoints/**/*")}
    weights = encoder(finished)
    done = run_module("fcmae.pretrain", *tiny_run(shards), cwd=finished.parents[2])
    assert done.returncode == 0
    assert "This run is complete: step 6 of 6" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("checkpoints/**/*")} == before
    assert all(torch.equal(weights[name], value) for name, value in encoder(finished).items())


def test_settings_that_decide_the_result_may_not_change(finished, shards):
    done = run_module("fcmae.pretrain", *tiny_run(shards, "model.mask_ratio=0.5"), cwd=finished.parents[2])
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.mask_ratio=0.5: the run in ")
    assert "/runs/demo/pretrain was started with 0.6; keep that or choose another run.dir" in done.stderr
    done = run_module("fcmae.pretrain", *tiny_run(shards, "run.resume=never"), cwd=finished.parents[2])
    assert done.returncode == 2
    assert "run.resume=never: run.dir=runs/demo/pretrain already holds a run" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_stopped_anywhere_and_continued_it_ends_with_the_same_bits(finished, shards, tmp_path, number):
    command = tiny_run(shards, "run.checkpoint_every=1", "data.workers=1")
    # A slow step, so that the signal arrives between two of them.
    code = (
        "import time, torch, fcmae.runtime.loop as loop; step = loop._step\n"
        "def slow(*a): time.sleep(0.4); step(*a)\n"
        "loop._step = slow\n"
        "from fcmae.pretrain import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    run = tmp_path / "runs" / "demo" / "pretrain"
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step-00000002").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)
    if number == signal.SIGTERM:  # Slurm to all processes, torchrun to its own
        time.sleep(0.1)
        os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 128 + number, errors
        assert f"Stopped by {number.name} after step" in output
        assert "Continue with:  python -m fcmae.pretrain" in output
        assert "Traceback" not in errors
    assert len(records(run)) < 6
    done = run_module("fcmae.pretrain", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected, actual = encoder(finished), encoder(run)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert [r["loss"] for r in records(run)] == [r["loss"] for r in records(finished)]


def test_ranks_of_torchrun_stop_together_and_save(shards, tmp_path):
    arguments = tiny_run(shards, "data.workers=2", "optim.epochs=2000", "run.dir=run")
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fcmae.pretrain",
         *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(records(tmp_path / "run")) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()  # torchrun then sends it to the groups of its processes
    output, errors = process.communicate(timeout=60)
    step = records(tmp_path / "run")[-1]["step"]
    assert f"Stopped by SIGTERM after step {step}" in output, errors
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    assert "DataLoader" not in errors


def test_max_steps_stops_early_and_more_steps_continue(finished, shards, tmp_path):
    for stop in (2, 6):
        done = run_module("fcmae.pretrain", *tiny_run(shards, f"run.max_steps={stop}"), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    expected, actual = encoder(finished), encoder(tmp_path / "runs" / "demo" / "pretrain")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def torchrun(ranks: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "fcmae.pretrain"]
    return subprocess.run(
        [sys.executable, *words, *arguments],
        cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_two_ranks_compute_what_one_does_and_continue_as_one(finished, shards, tmp_path):
    arguments = tiny_run(shards)
    done = torchrun(2, *arguments, "run.max_steps=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Grad strides" not in done.stderr
    assert len(records(tmp_path / "runs" / "demo" / "pretrain")) == 4
    done = run_module("fcmae.pretrain", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for one, two in zip(records(finished), records(tmp_path / "runs" / "demo" / "pretrain"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_three_ranks_in_two_parts_end_with_the_same_bits(shards, tmp_path):
    # Where the order of sums depends on how DDP lays out gradients.
    for name, parts in (("whole", [[]]), ("parts", [["run.max_steps=3"], []])):
        for part in parts:
            done = torchrun(3, *tiny_run(shards, f"run.dir={name}", *part), cwd=tmp_path)
            assert done.returncode == 0, done.stderr
    whole, parts = (encoder(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [r["loss"] for r in records(tmp_path / "whole")] == [r["loss"] for r in records(tmp_path / "parts")]


def test_two_ranks_render_the_demo_and_draw_pictures(tmp_path):
    # Rank 0 renders and draws alone; the other must neither wait for it elsewhere nor find half a data set.
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fcmae.pretrain",
         "model.image_size=16", "optim.batch_size=16", "run.max_steps=4", "run.picture_every=2", "data.workers=0"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pictures = sorted(p.name for p in (tmp_path / "runs" / "demo" / "pretrain" / "reconstructions").iterdir())
    assert pictures == ["step-00000002.png", "step-00000004.png"]
    assert done.stdout.count("Done: step 4") == 1


def test_compiled_blocks_train_alike_and_resume_uncompiled(finished, shards, tmp_path):
    done = run_module("fcmae.pretrain", *tiny_run(shards, "run.compile=true", "run.max_steps=4"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_module("fcmae.pretrain", *tiny_run(shards), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for one, two in zip(records(finished), records(tmp_path / "runs" / "demo" / "pretrain"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_bf16_grey_accumulation_and_masked_layout(tmp_path):
    make_split(tmp_path / "train", 24, channels=1)
    done = run_module(
        "fcmae.pretrain",
        *tiny_run(
            tmp_path, "model.in_chans=1", "model.image_size=[16,24]", "optim.accumulate=3", "model.layout=masked"
        ),
        "run.precision=bf16",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert len(records(tmp_path / "runs" / "demo" / "pretrain")) == 2


@pytest.mark.parametrize(("dtype", "channels"), [("float32", 5), ("uint16", 2)])
def test_arrays_of_any_number_of_channels(tmp_path, dtype, channels):
    rng = np.random.default_rng(0)
    for number in range(24):
        array = rng.integers(0, 1000, (20, 26, channels)).astype(dtype)
        (tmp_path / "arrays" / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "arrays" / f"class{number % 2}" / f"{number}.npy", array)
    assert make_shards([str(tmp_path / "arrays"), str(tmp_path / "train")]) == 0
    numbers = ",".join(["500"] * channels) if dtype == "float32" else ",".join(["0.01"] * channels)
    options = [f"model.in_chans={channels}", f"data.mean=[{numbers}]", f"data.std=[{numbers}]"]
    done = run_module("fcmae.pretrain", *tiny_run(tmp_path, *options), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "demo" / "pretrain"
    assert all(0 < record["loss"] < 2 for record in records(run))
    assert Image.open(next((run / "reconstructions").glob("*.png"))).width > 200
    tune = ["checkpoint=" + str(run), "run.max_steps=2", "optim.batch_size=8", "run.dir=tuned", "data.workers=0"]
    done = run_module("finetune.train", *tune, "augment.rand_augment=rand-m9-mstd0.5-inc1", cwd=tmp_path)
    assert done.returncode == 2
    assert f"must be null with model.in_chans={channels}" in done.stderr
    done = run_module("finetune.train", *tune, "augment.rand_augment=null", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_broken_image_ends_the_run_in_one_line(tmp_path):
    from fcmae.data.index import read_index

    index = read_index(make_split(tmp_path / "train", 24))
    with open(index.source(0), "r+b") as shard:
        shard.seek(index.offset(3))
        shard.write(b"\0" * int(index.size[3]))
    done = run_module("fcmae.pretrain", *tiny_run(tmp_path), "data.workers=1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "shard-000000.tar: 000003.png cannot be decoded" in done.stderr
    assert done.stderr.count("\n") == 1


def test_bad_samples_are_left_out_and_counted(tmp_path):
    from fcmae.data.index import read_index

    index = read_index(make_split(tmp_path / "train", 48))
    with open(index.source(0), "r+b") as shard:
        shard.seek(index.offset(0))  # of which a reconstruction would be drawn
        shard.write(b"\0" * int(index.size[0]))
    metrics = []
    for name, workers, *more in (("one", 0), ("other", 2), ("stopped", 1, "run.max_steps=2"), ("stopped", 0)):
        options = ["data.on_error=skip", f"data.workers={workers}", f"run.dir={name}", *more]
        done = run_module("fcmae.pretrain", *tiny_run(tmp_path, *options), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("left out: ") == 1
        assert "shard-000000.tar: 000000.png cannot be decoded: is in no image format" in done.stdout
        metrics.append([(record["loss"], record["bad_samples"]) for record in records(tmp_path / name)])
    assert metrics[0] == metrics[1] == metrics[3]
    assert metrics[0][:2] == metrics[2]
    counts = [count for _, count in metrics[0]]
    assert [sorted(counts[:2]), sorted(counts[2:])] == [[0, 1], [0, 1]]  # once in each epoch of two steps
    tune = ["checkpoint=one", "run.dir=tuned", "optim.batch_size=24", "run.max_steps=2", "data.on_error=skip"]
    done = run_module("finetune.train", *tune, "data.workers=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sum(record["bad_samples"] for record in records(tmp_path / "tuned")) == 1


def test_an_image_that_cannot_be_shown_ends_no_run(shards, tmp_path):
    from fcmae.data.index import read_index

    index = read_index(make_split(tmp_path / "val", 20))
    with open(index.source(0), "r+b") as shard:
        shard.seek(index.offset(0))
        shard.write(b"\0" * int(index.size[0]))
    options = ["run.picture_every=2", "run.max_steps=3", "run.dir=run", f"data.val={tmp_path / 'val'}"]
    done = run_module("fcmae.pretrain", *tiny_run(shards, *options), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for step in (2, 3):
        assert f"no reconstructions after step {step}: {index.source(0)}: 000000.png cannot be decoded" in done.stdout
    assert "Done: step 3" in done.stdout
    assert (tmp_path / "run" / "encoder.safetensors").is_file()


def test_a_killed_worker_ends_the_run_with_a_message(shards, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "fcmae.pretrain", *tiny_run(shards), "data.workers=1", "optim.epochs=2000"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "runs" / "demo" / "pretrain" / "metrics.jsonl").exists() or not records(
        tmp_path / "runs" / "demo" / "pretrain"
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    os.kill(int(worker), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("error: DataLoader worker ")
    assert "Something outside ended it, often for lack of memory" in errors
    assert errors.count("\n") == 1, errors


def test_the_closing_command_names_recipe_and_folder():
    config = PretrainConfig()
    config.run.name, config.run.dir = "demo", "runs/demo/pretrain"
    assert finetune_command(config) == "python -m finetune.train checkpoint=runs/demo/pretrain"
    config.run.name, config.run.dir = "fashion_mnist", "runs/fashion_mnist/pretrain"
    expected = "python -m finetune.train experiment=fashion_mnist checkpoint=runs/fashion_mnist/pretrain"
    assert finetune_command(config) == expected
    config.run.name, config.run.dir = "mine", "runs/mine/pretrain"
    expected = "python -m finetune.train checkpoint=runs/mine/pretrain run.dir=runs/mine/finetune"
    assert finetune_command(config) == expected
    config.run.dir = "my runs/a"
    expected = """python -m finetune.train 'checkpoint="my runs/a"' 'run.dir="my runs/a-finetune"'"""
    assert finetune_command(config) == expected


def test_jobs_of_a_multirun_have_folders_of_their_own(shards, tmp_path):
    arguments = tiny_run(shards, "optim.lr=1e-3,1e-2", "run.max_steps=1", "run.dir=sweep")
    done = run_module("fcmae.pretrain", "-m", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [len(records(tmp_path / "sweep" / job)) for job in "01"] == [1, 1]


def test_visualize_draws_a_run(finished, shards, tmp_path):
    done = run_module(
        "fcmae.visualize", f"checkpoint={finished}", "count=3", "mask_ratio=0.4", "output=out/rows.png",
        f"shards={shards / 'val'}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 images" in done.stdout
    assert Image.open(tmp_path / "out" / "rows.png").height > 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=/nowhere"], "checkpoint=/nowhere: no such file or folder"),
        (["checkpoint=."], "must be a run or checkpoint folder of fcmae.pretrain"),
        (["device=tpu"], "device=tpu: must be auto, cpu, cuda or cuda:N"),
        (["mask_ratio=2"], "mask_ratio=2.0: must be greater than 0 and less than 1"),
        (["count=0"], "count=0: must be at least 1"),
        (["output=x.jpg"], "output=x.jpg: must end in .png"),
        (["mask_ration=1"], "mask_ration=1: no such setting; did you mean mask_ratio?"),
    ],
)
def test_visualize_mistakes(tmp_path, arguments, message):
    done = run_module("fcmae.visualize", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
