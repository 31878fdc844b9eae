"""The minkowski layout against the masked reference, on the real MinkowskiEngine; and what is said without it."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import run_module, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    CASES,
    assert_compiled_equals_eager,
    drop_half_of_the_images,
    loss_and_gradients,
    randomise,
    relative,
    small_model,
)

from fcmae import architecture
from fcmae.errors import ConfigError
from fcmae.model import LAYOUTS, create_model
from fcmae.settings import ModelConfig
from fcmae.sparse.packed import PackedLayout
from fcmae.sparse.tiles import draw_visible, removed_on_map
from fcmae.visualize import VisualizeConfig


def minkowski(test):
    """Mark a test that needs the library."""
    missing = find_spec("MinkowskiEngine") is None
    skip = pytest.mark.skipif(
        missing, reason="MinkowskiEngine is not installed; scripts/install_minkowski.sh builds it"
    )
    return pytest.mark.minkowski(skip(test))


def encoded(model, images, visible, layout):
    """Features, and the gradients of a random projection of them: of the image and of every encoder parameter."""
    model.layout = layout
    parameters = {n: p for n, p in model.encoder.named_parameters() if p.requires_grad}
    images = images.clone().requires_grad_()
    features = model.encode(images, visible)
    seed = torch.randn(features.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    gradients = torch.autograd.grad((features * seed).sum(), [images, *parameters.values()])
    return features, dict(zip(["image", *parameters], gradients, strict=True))


def assert_same(model, images, visible, tolerance=1e-9):
    expected, expected_gradients = encoded(model, images, visible, "masked")
    actual, gradients = encoded(model, images, visible, "minkowski")
    assert actual.shape == expected.shape
    assert relative(actual, expected) < tolerance
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # A parameter that hardly matters (behind a norm over few channels) has a gradient of nothing but rounding.
        assert (gradients[name] - gradient).norm() <= tolerance * (gradient.norm() + 1e-3 * largest), name
    removed = removed_on_map(visible, model.grid, model.patch_size).unsqueeze(1)
    assert not gradients["image"].masked_select(removed).any()


@minkowski
@pytest.mark.parametrize("options", CASES)
def test_equals_masked_in_float64(options):
    model = small_model(**options)
    images = torch.randn(3, model.in_chans, *model.image_size, dtype=torch.float64)
    visible = model.draw_visible(3, torch.Generator().manual_seed(1))
    masked, masked_gradients = loss_and_gradients(model, images, visible, "masked")
    actual, gradients = loss_and_gradients(model, images, visible, "minkowski")
    assert relative(actual.prediction, masked.prediction) < 1e-12
    assert relative(actual.loss, masked.loss) < 1e-12
    assert set(gradients) == set(masked_gradients)
    for name, gradient in masked_gradients.items():
        assert gradient.norm() > 0, name
        assert relative(gradients[name], gradient) < 1e-9, name
        # DDP's buckets expect plain strides.
        assert gradients[name].stride() == dict(model.named_parameters())[name].stride(), name
    assert_same(model, images, visible)


@minkowski
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 5),
    stem_stride=st.sampled_from([1, 2, 4]),
    side=st.sampled_from([1, 2]),  # of a tile in the last stage: 8 or 16 in the first
    in_chans=st.integers(1, 4),
    dims=st.tuples(*[st.sampled_from([2, 3, 5, 7])] * 4),
    batch=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_equals_masked_on_any_grid(rows, columns, stem_stride, side, in_chans, dims, batch, data):
    count = data.draw(st.integers(1, rows * columns))
    patch = 8 * stem_stride * side
    torch.manual_seed(rows * 100 + columns * 10 + count)
    # A model needs a removed patch, its encoder does not: it runs on a grid of the drawn shape.
    model = create_model(
        "mini", image_size=patch * 2, patch_size=patch, stem_stride=stem_stride, in_chans=in_chans, dims=dims,
        decoder_dim=1,
    ).double()  # fmt: skip
    randomise(model)
    model.grid, model.image_size = (rows, columns), (rows * patch, columns * patch)
    images = torch.randn(batch, in_chans, *model.image_size, dtype=torch.float64)
    assert_same(model, images, draw_visible(batch, rows * columns, count))


@minkowski
@pytest.mark.parametrize("visible", [[0, 1, 2], [2, 6, 10], [4, 5, 6, 7], [0, 11], [5]], ids=str)
def test_whole_rows_and_columns_removed(visible):
    model = small_model(image_size=(48, 64), patch_size=16, stem_stride=2)  # 3 rows of 4 patches
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    assert_same(model, images, torch.tensor([visible] * 2))


@minkowski
def test_pixels_of_zero_are_sites():
    model = small_model(image_size=64, patch_size=16, stem_stride=2)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    images[0, :, :20] = 0
    images[1] = 0
    assert_same(model, images, torch.tensor([[0, 1, 5, 7]] * 2))


@minkowski
def test_a_channel_of_zeros_has_zero_gradient():
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    images[0, 1] = 0
    visible = torch.tensor([[0, 2, 5], [1, 3, 4]])
    stem = torch.nn.Conv2d(3, 3, 1).double()
    torch.nn.init.dirac_(stem.weight)
    torch.nn.init.zeros_(stem.bias)
    gamma, beta = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    results = []
    for layout in (PackedLayout(visible, (2, 3)), LAYOUTS["minkowski"](visible, (2, 3))):
        pixels = images.clone().requires_grad_()
        out = layout.gather(layout.response_norm(layout.embed(pixels, stem), gamma, beta, 1e-6))
        results.append([out, *torch.autograd.grad(out.square().sum(), [pixels, gamma, beta])])
    for expected, actual in zip(*results, strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected)


@minkowski
@pytest.mark.parametrize("poison", ["noise", "nan"])
def test_masked_pixels_leave_no_trace(poison):
    model = small_model(torch.float32, image_size=(96, 64))
    images, visible = torch.randn(2, 3, 96, 64), model.draw_visible(2)
    removed = removed_on_map(visible, model.grid, 32).unsqueeze(1)
    filling = torch.randn_like(images) * 100 if poison == "noise" else torch.full_like(images, torch.nan)
    features, gradients = encoded(model, images, visible, "minkowski")
    poisoned, poisoned_gradients = encoded(model, torch.where(removed, filling, images), visible, "minkowski")
    assert torch.equal(features, poisoned)
    assert all(torch.equal(gradients[name], poisoned_gradients[name]) for name in gradients)


@minkowski
def test_float32_on_atto():
    torch.manual_seed(0)
    model = create_model("atto", image_size=(96, 128), decoder_dim=64)
    randomise(model)
    images, visible = torch.randn(1, 3, 96, 128), model.draw_visible(1)
    masked, masked_gradients = loss_and_gradients(model, images, visible, "masked")
    actual, gradients = loss_and_gradients(model, images, visible, "minkowski")
    assert actual.prediction.dtype == torch.float32
    assert relative(actual.prediction, masked.prediction) < 1e-4
    for name, gradient in masked_gradients.items():
        assert relative(gradients[name], gradient) < 1e-4, name


@minkowski
def test_bfloat16_autocast_stays_close_to_float64():
    torch.manual_seed(0)
    model = create_model("mini", image_size=64, decoder_dim=32).double()
    randomise(model, scale=0.05)
    images, visible = torch.randn(4, 3, 64, 64, dtype=torch.float64), model.draw_visible(4)
    expected, expected_gradients = loss_and_gradients(model, images, visible, "masked")
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        actual, gradients = loss_and_gradients(model, images.float(), visible, "minkowski")
    assert actual.loss.dtype == torch.float32
    assert relative(actual.prediction.double(), expected.prediction) < 2e-2
    total = torch.cat([g.flatten() for g in gradients.values()]).double()
    assert relative(total, torch.cat([g.flatten() for g in expected_gradients.values()])) < 2e-2


@minkowski
def test_drop_path_drops_the_same_images_and_the_generator_stays_in_step():
    model = small_model(image_size=64, patch_size=16, stem_stride=2)
    drop_half_of_the_images(model)
    images, visible = torch.randn(5, 3, 64, 64, dtype=torch.float64), model.draw_visible(5)
    results = []
    for layout in ("masked", "minkowski"):
        torch.manual_seed(3)
        results.append((*encoded(model, images, visible, layout), torch.get_rng_state()))
    (expected, expected_gradients, state), (actual, gradients, state_after) = results
    assert relative(actual, expected) < 1e-12
    assert all(relative(gradients[name], expected_gradients[name]) < 1e-9 for name in gradients)
    assert torch.equal(state, state_after)


@minkowski
def test_same_bits_again_and_threads_left_alone():
    model = small_model(torch.float32, image_size=64)
    images, visible = torch.randn(2, 3, 64, 64), model.draw_visible(2)
    threads = torch.get_num_threads()
    first, first_gradients = encoded(model, images, visible, "minkowski")
    second, second_gradients = encoded(model, images, visible, "minkowski")
    assert torch.get_num_threads() == threads
    assert torch.equal(first, second)
    assert all(torch.equal(first_gradients[name], second_gradients[name]) for name in first_gradients)


@minkowski
def test_compiled_block_equals_eager():
    assert_compiled_equals_eager("minkowski")


@minkowski
def test_trains_from_the_command_line(shards, tmp_path, monkeypatch):
    for steps, precision in ((3, "fp32"), (6, "bf16")):  # begun in one, continued in the other
        arguments = ["model.layout=minkowski", f"run.precision={precision}", f"run.max_steps={steps}"]
        done = run_module("fcmae.pretrain", *tiny_run(shards, *arguments), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"Done: step {steps}" in done.stdout
        assert done.stderr == ""
    run = tmp_path / "runs" / "demo" / "pretrain"
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    assert all(0 < loss < 10 for loss in losses)
    # Pictures of the run need no library.
    monkeypatch.setattr(architecture, "find_spec", lambda name: None)
    VisualizeConfig(checkpoint=str(run)).validate()


def test_without_the_library_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(architecture, "find_spec", lambda name: None)
    line = "layout=minkowski: MinkowskiEngine is not installed; scripts/install_minkowski.sh builds it"
    with pytest.raises(ConfigError, match=rf"^model\.{line}$"):
        ModelConfig(layout="minkowski").validate()
    with pytest.raises(ConfigError, match=f"^{line}$"):
        create_model("mini", image_size=64, layout="minkowski")


def test_a_library_that_does_not_load_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)  # importing it raises ImportError
    monkeypatch.delitem(sys.modules, "fcmae.sparse.minkowski", raising=False)
    line = r"^layout=minkowski: MinkowskiEngine does not load here \(.+\); scripts/install_minkowski.sh builds it for"
    with pytest.raises(ConfigError, match=line):
        LAYOUTS["minkowski"](torch.zeros(1, 1, dtype=torch.int64), (1, 1))


def test_there_is_no_second_derivative():
    model = small_model(image_size=64, patch_size=16, stem_stride=2)
    model.layout = "minkowski"
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    features = model.encode(images, model.draw_visible(1))
    with pytest.raises(RuntimeError, match="layout minkowski has first derivatives only"):
        torch.autograd.grad(features.square().sum(), images, create_graph=True)
