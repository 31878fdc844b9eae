"""FCMAE: sizes, geometry, targets and loss against plain references, initialisation, decay groups, bad arguments."""

from __future__ import annotations

import pytest
import timm
import torch

import fcmae
from fcmae.architecture import SIZES, num_visible
from fcmae.model import create_encoder
from fcmae.runtime.optim import build_optimizer
from fcmae.settings import OptimConfig

# Millions of parameters of a 1000-class classifier, paper appendix A.
PARAMETERS = {
    "atto": 3.71,
    "femto": 5.23,
    "pico": 9.07,
    "nano": 15.62,
    "tiny": 28.64,
    "base": 88.72,
    "large": 197.96,
    "huge": 660.29,
}


@pytest.mark.parametrize("size", PARAMETERS)
def test_sizes_have_the_published_parameters_and_timms_names(size):
    with torch.device("meta"):
        classifier = create_encoder(size, num_classes=1000)
        model = fcmae.create_model(size)
        reference = timm.create_model(f"convnextv2_{size}", num_classes=0)
    assert sum(p.numel() for p in classifier.parameters()) / 1e6 == pytest.approx(PARAMETERS[size], abs=0.01)
    shapes = {name: tuple(value.shape) for name, value in model.encoder.state_dict().items()}
    assert shapes == {name: tuple(value.shape) for name, value in reference.state_dict().items()}


def test_mini_is_smaller_than_atto():
    mini, atto = (sum(p.numel() for p in create_encoder(size).parameters()) for size in ("mini", "atto"))
    assert mini < atto / 4
    assert set(SIZES) == {"mini", *PARAMETERS}


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_stem_stride_sets_the_total_stride(stride):
    encoder = create_encoder("mini", stem_stride=stride)
    assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 128)
    assert encoder.forward_features(torch.zeros(1, 3, 64, 64)).shape[-1] == 64 // (8 * stride)
    assert [info["reduction"] for info in encoder.feature_info] == [stride, 2 * stride, 4 * stride, 8 * stride]


def test_visible_patches_of_the_paper():
    assert num_visible(49, 0.6) == 19
    assert num_visible(10, 0.9) == 1  # 10 * (1 - 0.9) is 0.99… in floating point
    assert num_visible(5, 0.6) == 2


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_against_a_plain_reference(norm_pix_loss):
    model = fcmae.create_model("mini", image_size=(64, 96), norm_pix_loss=norm_pix_loss, decoder_dim=16).double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    output = model(images, generator=torch.Generator().manual_seed(0))
    assert output.prediction.shape == (2, 6, 32 * 32 * 3)
    total, count = 0.0, 0
    for b in range(2):
        for patch in range(6):
            y, x = patch // 3 * 32, patch % 3 * 32
            target = images[b, :, y : y + 32, x : x + 32].permute(1, 2, 0).flatten()
            if norm_pix_loss:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            if output.mask[b, patch]:
                total += (output.prediction[b, patch] - target).square().mean()
                count += 1
    assert count == 2 * 4
    torch.testing.assert_close(output.loss, total / count)


def test_predicting_the_mean_scores_one():
    # What the loss means: with normalised targets, a prediction of zero everywhere has an error of the variance, 1.
    model = fcmae.create_model("mini", image_size=64, mask_ratio=0.5, decoder_dim=16)
    torch.nn.init.zeros_(model.pred.weight)
    assert model(torch.randn(4, 3, 64, 64)).loss.item() == pytest.approx(1.0, abs=0.01)


def test_prediction_lands_on_its_own_pixels_for_patches_of_several_positions():
    # A patch of 64 pixels is 2×2 positions of 32: set the prediction of one position and see which pixels move.
    model = fcmae.create_model("mini", image_size=128, patch_size=64, mask_ratio=0.5, decoder_dim=8, decoder_depth=0)
    visible = torch.tensor([[0, 3]])
    with torch.no_grad():
        model.proj.weight.zero_()
        model.mask_token.zero_()
        model.pred.weight.zero_()
        model.pred.bias.zero_()
        features = torch.zeros(1, 2, 2, 2, 128)
        features[0, 1, 0, 1] = 1.0  # patch 3, position row 0, column 1
        model.proj.weight[0] = 1.0
        model.pred.weight[:, 0] = 1.0
        prediction = model.forward_decoder(features, visible).view(4, 64, 64, 3)
    expected = torch.zeros(4, 64, 64, 3)
    expected[3, :32, 32:] = 128.0
    torch.testing.assert_close(prediction, expected)


def test_initialisation():
    torch.manual_seed(0)
    model = fcmae.create_model("atto")
    for name, value in model.named_parameters():
        if name.endswith("bias") or ".grn." in name:
            assert (value == 0).all(), name
        elif "norm" in name or name.startswith("encoder.stem.1"):
            assert (value == 1).all() or value.ndim > 1, name
        elif value.numel() > 500:
            assert value.std().item() == pytest.approx(0.02, rel=0.15), name


def test_no_norm_bias_grn_or_mask_token_decays():
    model = fcmae.create_model("mini", image_size=64, mask_ratio=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.05))
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    # The encoder's final norm is not trained; everything else is.
    assert set(names.values()) - set(decay) == {"encoder.head.norm.weight", "encoder.head.norm.bias"}
    for name, value in decay.items():
        free = (
            name.endswith("bias")
            or ".grn." in name
            or "norm" in name
            or name == "mask_token"
            or name.endswith("stem.1.weight")
        )
        free = free or name.endswith("downsample.0.weight")
        assert value == (0.0 if free else 0.05), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "giant"}, r"size=giant: must be one of mini, atto"),
        ({"mask_ratio": 1.5}, r"mask_ratio=1.5: must be greater than 0 and less than 1"),
        ({"mask_ratio": 0.99}, r"mask_ratio=0.99: leaves 0 of 49 patches visible"),
        ({"image_size": 100}, r"image_size=100: height and width must be multiples of patch_size=32"),
        ({"image_size": (64, 65)}, r"image_size=\(64, 65\): height and width must be multiples"),
        ({"image_size": "big"}, r"image_size=big: must be a positive integer or \[height, width\]"),
        ({"patch_size": 16}, r"patch_size=16: must be a multiple of the encoder's total stride, 32"),
        ({"stem_stride": 3}, r"stem_stride=3: must be 1, 2 or 4"),
        ({"depths": (1, 2)}, r"depths=\(1, 2\): must be four positive integers"),
        ({"layout": "dense"}, r"layout=dense: must be one of packed, masked"),
        ({"in_chans": 0}, r"in_chans=0: must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fcmae.create_model(**({"size": "mini"} | arguments))


def test_bad_inputs_are_named():
    model = fcmae.create_model("mini", image_size=64, mask_ratio=0.5, decoder_dim=16)
    with pytest.raises(ValueError, match=r"images have shape \(1, 1, 64, 64\); this model takes \(B, 3, 64, 64\)"):
        model(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match=r"visible is torch.int32 of shape"):
        model.encode(torch.zeros(1, 3, 64, 64), torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="layout=nope"):
        model.layout = "nope"


def test_visible_patches_that_cannot_be_are_named():
    model = fcmae.create_model("mini", image_size=64, patch_size=32)
    images = torch.randn(2, 3, 64, 64)
    for ids in ([[0, 0], [0, 1]], [[0, 1], [1, 4]], [[-1, 0], [0, 1]]):
        with pytest.raises(ValueError, match="visible must hold different patch ids from 0 to 3 per image"):
            model(images, torch.tensor(ids))
    with pytest.raises(ValueError, match="visible holds all 4 patches; the loss needs a removed one"):
        model(images, torch.arange(4).expand(2, 4))
    assert model.encode(images, torch.arange(4).expand(2, 4)).shape[1] == 4
    for batch, count in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match=r"a batch needs an image and a visible patch"):
            model(images[:batch], torch.zeros(batch, count, dtype=torch.int64))


def test_batch_of_one_trains():
    model = fcmae.create_model("mini", image_size=64, mask_ratio=0.5, decoder_dim=16)
    model(torch.randn(1, 3, 64, 64)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
