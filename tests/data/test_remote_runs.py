"""Whole runs over a network that fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import make_split, run_module, tiny_run
from servers import flaky_server


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_over_the_network_is_the_run_from_the_folder(shards, tmp_path):
    options = ["data.block_shards=2", "run.dir=local"]
    local = run_module("fcmae.pretrain", *tiny_run(shards, *options), cwd=tmp_path)
    assert local.returncode == 0, local.stderr
    with flaky_server(shards, share=0.3) as server:
        options = [f"data.train={server.url}/train", f"data.cache_dir={tmp_path / 'cache'}", "data.workers=2"]
        options += ["data.block_shards=2", "run.dir=remote"]
        done = run_module("fcmae.pretrain", *tiny_run(shards, *options), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"from {server.url}/train" in done.stdout
        assert losses(tmp_path / "remote") == losses(tmp_path / "local")
        assert server.served["/val/index.safetensors"] >= 1  # data.val=auto looks beside the training shards
        options = ["checkpoint=remote", "run.dir=tuned", "optim.batch_size=24", "run.max_steps=2", "data.workers=0"]
        tuned = run_module("finetune.train", *options, f"data.cache_dir={tmp_path / 'cache'}", cwd=tmp_path)
        assert tuned.returncode == 0, tuned.stderr


def test_bad_locations_are_answered_in_a_line(shards, tmp_path):
    with flaky_server(shards) as server:
        for value, answer in (
            (f"data.train={server.url}/nothing", "there is no such file"),
            ("data.train=ftp://host/train", "must be a path or begin with http://, https://, s3://, gs://"),
            ('data.train="pipe:cat {}"', "commands are only run with data.allow_pipe=true"),
        ):
            done = run_module("fcmae.pretrain", *tiny_run(shards, value, "data.val=null"), cwd=tmp_path)
            assert done.returncode == 2, value
            assert done.stderr.startswith("error: data.train="), done.stderr
            assert answer in done.stderr
            assert done.stderr.count("\n") == 1, done.stderr
        options = [f"data.train={server.url}/train", "data.cache_gb=0.00001", "data.block_shards=1"]
        options += [f"data.cache_dir={tmp_path / 'cache'}"]
        done = run_module("fcmae.pretrain", *tiny_run(shards, *options), cwd=tmp_path)
        assert done.returncode == 2
        assert "data.cache_gb=1e-05: must be at least" in done.stderr
        (tmp_path / "file").write_text("")
        options = [f"data.train={server.url}/train", f"data.cache_dir={tmp_path / 'file' / 'cache'}"]
        done = run_module("fcmae.pretrain", *tiny_run(shards, *options), cwd=tmp_path)
        assert done.returncode == 2
        assert f"data.cache_dir={tmp_path / 'file' / 'cache'}: cannot be used" in done.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_waits_for_a_silent_server_can_be_stopped(tmp_path, workers):
    make_split(tmp_path / "train", 240, per_shard=24)
    with flaky_server(tmp_path) as server:
        options = [f"data.train={server.url}/train", f"data.cache_dir={tmp_path / 'cache'}"]
        options += [f"data.workers={workers}", "data.block_shards=1", "data.val=null", "run.dir=run", "optim.epochs=50"]
        options += ["run.checkpoint_every=1"]
        command = [sys.executable, "-m", "fcmae.pretrain", *tiny_run(tmp_path, *options)]
        allowed = 4
        server.failure = lambda path: "silence" if ".tar" in path and server.served.total() > allowed else None
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        metrics, seen = tmp_path / "run" / "metrics.jsonl", -1
        deadline = time.monotonic() + 60
        while not metrics.exists() or seen != len(metrics.read_text().splitlines()) or seen < 1:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            seen = len(metrics.read_text().splitlines()) if metrics.exists() else -1
            time.sleep(2)
        state = tmp_path / "run" / "checkpoints" / f"step-{seen:08d}" / "state.json"
        written = state.stat().st_mtime_ns
        server.failure = lambda path: None  # for the picture at the end; what hangs goes on hanging
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)
        assert process.returncode == 143, errors
        assert f"after step {seen}" in output
        assert state.stat().st_mtime_ns == written  # not removed and written again
