"""What a user gets wrong is answered in one line with key, value and what is allowed, before torch is loaded."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time

import pytest
from conftest import run_module
from hydra.core.override_parser.overrides_parser import OverridesParser

from fcmae.configuration import check_overrides, describe, expected_type, leaf_keys, override, to_dataclass
from fcmae.errors import ConfigError
from fcmae.settings import PretrainConfig
from finetune.settings import FinetuneConfig

MISTAKES = [
    (["optim.lrr=3"], "optim.lrr=3: no such setting; did you mean optim.lr?"),
    (["+optim.lrr=3"], "optim.lrr=3: no such setting; did you mean optim.lr?"),
    (["+lr=3"], "lr=3: no such setting; did you mean optim.lr?"),
    (["foo=3"], "foo=3: no such setting; settings start with"),
    (["model.zzz=3"], "model.zzz=3: no such setting; model takes"),
    (["modle=atto"], "modle=atto: no such setting; did you mean model?"),
    (["model=giant"], "Could not find 'model/giant' Available options in 'model': atto base"),
    (["optim.lr"], "optim.lr: cannot be read as key=value"),
    (["run.dir=a[1"], "run.dir=a[1: cannot be read as key=value"),
    (["model.mask_ratio=1.5"], "model.mask_ratio=1.5: must be greater than 0 and less than 1"),
    (["model.mask_ratio=x"], "model.mask_ratio=x: must be a number"),
    (["model.image_size=50"], "model.image_size=50: height and width must be multiples of model.patch_size=8"),
    (["model.image_size=[48,50]"], "model.image_size=[48, 50]: height and width"),
    (["model.patch_size=12"], "model.patch_size=12: must be a multiple of the encoder's total stride, 8"),
    (["model.in_chans=4"], "model.in_chans=4: image files, as in data.train=demo, hold 1 (grey) or 3 (RGB) channels"),
    (["model.layout=minkowsky"], "model.layout=minkowsky: must be one of packed, masked"),
    (["optim.batch_size=10", "optim.accumulate=3"], "must be a multiple of ranks × optim.accumulate = 1 × 3"),
    (["optim.batch_size=5000"], "optim.batch_size=5000: must be at most the number of training images, 4,800"),
    (["optim.epochs=1.5"], "optim.epochs=1.5: must be an integer"),
    (["optim.warmup_epochs=900"], "optim.warmup_epochs=900.0: must be at least 0 and less than optim.epochs=9"),
    (["optim.betas=[0.9]"], "optim.betas=[0.9]: must be two numbers in [0, 1)"),
    (["data.train=/nowhere"], "data.train=/nowhere: no such file or folder"),
    (["data.on_error=ignore"], "data.on_error=ignore: must be raise or skip"),
    (["data.max_bad_fraction=1"], "data.max_bad_fraction=1.0: must be at least 0 and below 1"),
    (["data.mean=[0.5]"], "data.mean=[0.5]: must be 3 finite numbers"),
    (["data.crop_scale=[0.5,0.2]"], "data.crop_scale=[0.5, 0.2]: must be two shares"),
    (["run.compile=true", "model.layout=minkowski"], "run.compile=true: model.layout=minkowski cannot be compiled"),
    (["run.precision=fp16"], "run.precision=fp16: must be fp32 or bf16"),
    (["run.resume=/nowhere"], "run.resume=/nowhere: must be auto, never, or the path of a run or checkpoint folder"),
    (["run.device=cuda:x"], "run.device=cuda:x: must be auto, cpu, cuda or cuda:N"),
    (["model=null"], "model=null: must be the name of a file in conf/model"),
    (["optim.lr='${nope}'"], "Interpolation key 'nope' not found"),
    (["run.device=tpu"], "run.device=tpu: must be auto, cpu, cuda or cuda:N"),
    (["tracking.wandb=yes"], "tracking.wandb=yes: must be one of disabled, offline, online"),
    (["experiment=nope"], "Could not find 'experiment/nope'"),
    (["recipe=pretrain_80"], "recipe=pretrain_80: must be one of finetune_demo, finetune_fashion_mnist, pretrain_1600"),
    (["optim.base_lr=1e-9"], "optim.base_lr=1e-9: has no effect while optim.lr=0.0015; add optim.lr=null"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    started = time.monotonic()
    done = run_module("fcmae.pretrain", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - started < 3
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path):
    done = run_module("fcmae.pretrain", "optim.lr=-1", "run.debug=True", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: optim.lr=-1.0: must be positive"


def test_batch_must_divide_among_the_launched_ranks(tmp_path):
    done = run_module("fcmae.pretrain", "optim.batch_size=32", cwd=tmp_path, WORLD_SIZE="3", RANK="0")
    assert "optim.batch_size=32: must be a multiple of ranks × optim.accumulate = 3 × 1" in done.stderr


def test_validating_does_not_import_torch():
    code = (
        "import sys; import fcmae.pretrain, finetune.train, fcmae.visualize; from fcmae.settings import PretrainConfig;"
        "PretrainConfig().validate(); assert 'torch' not in sys.modules, 'torch'; assert 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


FINETUNE_MISTAKES = [
    (["checkpoint=/nowhere"], "checkpoint=/nowhere: no such file or folder; it must be a run folder"),
    (["checkpoint=null"], "model.size=null: choose one, as in model=atto, or give a checkpoint"),
    (
        ["checkpoint=null", "model=mini"],
        "data.train=null: choose a data set, as in data=demo, or the checkpoint of a run",
    ),
    (["checkpoint=null", "model=mini", "data=demo", "augment.mixup=-1"], "augment.mixup=-1.0: must be at least 0"),
    (["checkpoint=null", "model=mini", "data=demo", "augment.rand_augment=strong"], "must be null or timm's notation"),
    (
        ["checkpoint=null", "model=mini", "data=demo", "augment.rand_augment=rand-m9-w9"],
        "must be null or timm's notation",
    ),
    (["checkpoint=null", "model=mini", "data=demo", "augment.mixup=1", "optim.batch_size=15"], "mix pairs"),
    (
        ["checkpoint=null", "model=mini", "data=demo", "model.image_size=4"],
        "must be at least the encoder's total stride, 8",
    ),
    (["checkpoint=null", "model=mini", "data=demo", "ema.decay=1"], "ema.decay=1.0: must be in (0, 1), or null"),
    (["checkpoint=null", "model=mini", "data=demo", "layer_decay=2"], "layer_decay=2.0: must be in (0, 1]"),
    (["checkpoint=null", "model=mini", "data=demo", "eval.crop_share=0"], "eval.crop_share=0.0: must be in (0, 1]"),
    (["checkpoint=null", "model=mini", "data=demo", "model.drop_path=1"], "model.drop_path=1.0: must be in [0, 1)"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), FINETUNE_MISTAKES, ids=lambda value: value[-1] if isinstance(value, list) else ""
)
def test_finetune_mistakes(arguments, message, tmp_path):
    done = run_module("finetune.train", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_of_the_users_is_one_line(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("a: [1\nb: 2")
    done = run_module("fcmae.pretrain", f"--config-dir={tmp_path}", "experiment=mine", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_typed_overrides_are_quoted_where_they_must_be():
    assert override("run.dir", "runs/a-1.b") == "run.dir=runs/a-1.b"
    words = shlex.split(override("checkpoint", "my 'runs'/a=b [x]"))
    (parsed,) = OverridesParser.create().parse_overrides(words)
    assert parsed.value() == "my 'runs'/a=b [x]"


def test_values_pass_into_dataclasses():
    config = to_dataclass({"model": {"size": "base", "depths": [1, 2, 3, 4]}, "optim": {"lr": 1}}, PretrainConfig)
    assert config.model.depths == [1, 2, 3, 4]
    assert config.optim.lr == 1.0
    assert config.run.seed == 0


def test_learning_rate_scales_with_the_batch_unless_given():
    config = to_dataclass({"optim": {"batch_size": 4096}}, PretrainConfig)
    assert config.optim.absolute_lr == pytest.approx(1.5e-4 * 16)
    config.optim.lr = 0.1
    assert config.optim.absolute_lr == 0.1


def test_unknown_key_in_a_file_is_an_error():
    with pytest.raises(ConfigError, match=r"optim.momentum=0.9: no such setting"):
        to_dataclass({"optim": {"momentum": 0.9}}, PretrainConfig)


def test_user_config_folder_may_add_groups(tmp_path):
    (tmp_path / "mine").mkdir()
    check_overrides([f"--config-dir={tmp_path}", "+mine=x", "hydra.verbose=true"], PretrainConfig)
    with pytest.raises(ConfigError, match="mine=x"):
        check_overrides(["+mine=x"], PretrainConfig)


def test_expected_types_in_words():
    assert expected_type(PretrainConfig, "run.max_steps") == "an integer or null"
    assert expected_type(FinetuneConfig, "data.crop_scale") == "a list of numbers"
    assert "run.precision" in set(leaf_keys(PretrainConfig))
    assert describe(ConfigError("a.b", 1, "must be 2")) == "a.b=1: must be 2"
