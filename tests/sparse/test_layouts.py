"""Every layout computes the same function: outputs and gradients, against timm's own dense model and each other."""

from __future__ import annotations

import pytest
import timm
import torch
from models import CASES, assert_compiled_equals_eager, loss_and_gradients, randomise, relative, small_model

from fcmae.model import create_model
from fcmae.sparse.encoder import adopt_blocks
from fcmae.sparse.masked import DenseLayout, MaskedLayout
from fcmae.sparse.packed import PackedLayout
from fcmae.sparse.response import response_scale
from fcmae.sparse.tiles import (
    TileIndex,
    draw_visible,
    gather_tiles,
    patchify,
    removed_mask,
    removed_on_map,
    scatter_tiles,
    unpatchify,
)


@pytest.mark.parametrize("options", CASES)
def test_packed_equals_masked_in_float64(options):
    model = small_model(**options)
    images = torch.randn(3, model.in_chans, *model.image_size, dtype=torch.float64)
    visible = model.draw_visible(3, torch.Generator().manual_seed(1))
    packed, packed_gradients = loss_and_gradients(model, images, visible, "packed")
    masked, masked_gradients = loss_and_gradients(model, images, visible, "masked")
    assert relative(packed.prediction, masked.prediction) < 1e-12
    assert relative(packed.loss, masked.loss) < 1e-12
    assert torch.equal(packed.mask, masked.mask)
    assert set(packed_gradients) == set(masked_gradients)
    for name, gradient in masked_gradients.items():
        assert gradient.norm() > 0, name
        assert relative(packed_gradients[name], gradient) < 1e-9, name


def test_packed_equals_masked_in_float32_on_atto():
    torch.manual_seed(0)
    model = create_model("atto", image_size=(160, 224), decoder_dim=64)
    randomise(model)
    images = torch.randn(2, 3, 160, 224)
    visible = model.draw_visible(2)
    packed, packed_gradients = loss_and_gradients(model, images, visible, "packed")
    masked, masked_gradients = loss_and_gradients(model, images, visible, "masked")
    assert relative(packed.prediction, masked.prediction) < 1e-4
    for name, gradient in masked_gradients.items():
        assert relative(packed_gradients[name], gradient) < 1e-4, name


@pytest.mark.parametrize("layout", ["packed", "masked"])
def test_gradient_with_respect_to_the_image_matches_finite_differences(layout):
    model = small_model(image_size=16, patch_size=8, stem_stride=1, in_chans=1, mask_ratio=0.5)
    model.layout = layout
    visible = torch.tensor([[0, 3]])
    images = torch.randn(1, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model.encode(x, visible), (images,), fast_mode=True)


@pytest.mark.parametrize("size", ["atto", "tiny"])  # both kinds of MLP: 1x1 convolutions and linear layers
@pytest.mark.parametrize("layout", [PackedLayout, MaskedLayout])
def test_with_everything_visible_it_is_timms_dense_model(size, layout):
    torch.manual_seed(0)
    depths = {"depths": (1, 1, 2, 1)}
    model = create_model(size, image_size=(64, 96), mask_ratio=0.5, decoder_dim=16, **depths).double()
    randomise(model)
    dense = timm.create_model(f"convnextv2_{size}", num_classes=0, **depths).double()
    dense.load_state_dict(model.encoder.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    everything = torch.arange(6).expand(2, 6)
    model.layout = "packed" if layout is PackedLayout else "masked"
    tiles = model.encode(images, everything)
    expected = dense.forward_features(images)
    assert relative(tiles.reshape(2, 2, 3, -1).permute(0, 3, 1, 2), expected) < 1e-10
    # Adopted blocks still are timm's where no layout is given.
    assert torch.equal(model.encoder.forward_features(images), expected)


@pytest.mark.parametrize("poison", ["noise", "nan"])
@pytest.mark.parametrize("layout", ["packed", "masked"])
def test_masked_pixels_leave_no_trace(layout, poison):
    model = small_model(torch.float32, image_size=(96, 64))
    model.layout = layout
    images = torch.randn(2, 3, 96, 64)
    visible = model.draw_visible(2)
    removed = removed_on_map(visible, model.grid, 32).unsqueeze(1)
    filling = torch.randn_like(images) * 100 if poison == "noise" else torch.full_like(images, torch.nan)
    poisoned = torch.where(removed, filling, images)

    def features_and_gradients(x):
        model.zero_grad()
        features = model.encode(x, visible)
        features.square().sum().backward()
        return features, [p.grad.clone() for p in model.encoder.parameters() if p.requires_grad]

    features, gradients = features_and_gradients(images)
    features_poisoned, gradients_poisoned = features_and_gradients(poisoned)
    assert torch.equal(features, features_poisoned)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_poisoned, strict=True))


def test_same_input_gives_the_same_bits():
    model = small_model(torch.float32, image_size=64)
    images, visible = torch.randn(2, 3, 64, 64), model.draw_visible(2)
    first, first_gradients = loss_and_gradients(model, images, visible, "packed")
    second, second_gradients = loss_and_gradients(model, images, visible, "packed")
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(first_gradients[name], second_gradients[name]) for name in first_gradients)


@pytest.mark.parametrize("layout", ["packed", "masked"])
def test_bfloat16_autocast_stays_close_to_float64(layout):
    torch.manual_seed(0)
    model = create_model("mini", image_size=64, decoder_dim=32).double()
    randomise(model, scale=0.05)  # larger random weights amplify any rounding
    images, visible = torch.randn(4, 3, 64, 64, dtype=torch.float64), model.draw_visible(4)
    expected, expected_gradients = loss_and_gradients(model, images, visible, layout)
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        actual, gradients = loss_and_gradients(model, images.float(), visible, layout)
    assert actual.loss.dtype == torch.float32
    assert relative(actual.prediction.double(), expected.prediction) < 2e-2
    total = torch.cat([g.flatten() for g in gradients.values()]).double()
    assert relative(total, torch.cat([g.flatten() for g in expected_gradients.values()])) < 2e-2


def test_scatter_and_gather_are_each_others_inverse_and_gradient():
    index = TileIndex(torch.tensor([[0, 2, 5], [1, 3, 4]]), (2, 3))
    tiles = torch.randn(2, 3, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(2, 4, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gather_tiles(scatter_tiles(tiles, index), index), tiles)
    assert torch.autograd.gradcheck(lambda x: scatter_tiles(x, index), (tiles,))
    assert torch.autograd.gradcheck(lambda x: gather_tiles(x, index), (dense,))
    hidden = scatter_tiles(tiles, index)[removed_on_map(index.visible, (2, 3), 2)]
    assert torch.equal(hidden, torch.zeros_like(hidden))


def test_removed_mask_and_draw():
    visible = draw_visible(64, 12, 5, torch.Generator().manual_seed(0))
    assert visible.shape == (64, 5)
    assert visible.dtype == torch.int64
    assert (visible.diff(dim=1) > 0).all()
    mask = removed_mask(visible, 12)
    assert mask.sum(dim=1).tolist() == [7] * 64
    assert not mask.gather(1, visible).any()
    # Uniform: every patch is kept about equally often (64 * 5 / 12 = 26.7 times; bounds five standard deviations wide).
    counts = torch.bincount(visible.flatten(), minlength=12)
    assert counts.min() > 26.7 - 20
    assert counts.max() < 26.7 + 20


def test_patchify_order_and_inverse():
    images = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    # Patch 4 is row 1, column 1; inside it rows, then columns, then channels.
    assert torch.equal(patches[1, 4].view(4, 4, 3), images[1, :, 4:8, 4:8].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 4, (2, 3)), images)


class TestResponseNorm:
    @pytest.mark.parametrize("layout", ["packed", "dense"])
    def test_matches_the_formula_with_gradients(self, layout):
        x = torch.randn(2, 3, 2, 2, 5, dtype=torch.float64)
        x = x if layout == "packed" else x.reshape(2, 6, 2, 5)
        x.requires_grad_()
        gamma, beta = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        apply = PackedLayout(torch.zeros(2, 3, dtype=torch.int64), (1, 3)) if layout == "packed" else DenseLayout()
        actual = apply.response_norm(x, gamma, beta, 1e-6)
        flat = x.flatten(1, -2)
        norm = flat.norm(dim=1, keepdim=True)  # (B, 1, C): per image
        expected = (gamma * (flat * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + beta + flat).view_as(x)
        torch.testing.assert_close(actual, expected)
        seed = torch.randn_like(expected)
        for a, b in zip(
            torch.autograd.grad((actual * seed).sum(), (x, gamma, beta), retain_graph=True),
            torch.autograd.grad((expected * seed).sum(), (x, gamma, beta)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)

    def test_a_channel_of_zeros_has_zero_gradient(self):
        x = torch.randn(2, 3, 2, 2, 4)
        x[0, ..., 1] = 0
        x[1] = 0
        x.requires_grad_()
        layout = PackedLayout(torch.zeros(2, 3, dtype=torch.int64), (1, 3))
        layout.response_norm(x, torch.ones(4), torch.zeros(4), 1e-6).square().sum().backward()
        assert x.grad.isfinite().all()
        assert (x.grad[0, ..., 1] == 0).all()

    def test_statistics_are_float32_for_half_inputs(self):
        # 300 squared overflows float16; the norm of 4,096 such values does not overflow float32.
        x = torch.full((1, 1, 64, 64, 2), 300.0, dtype=torch.float16)
        layout = PackedLayout(torch.zeros(1, 1, dtype=torch.int64), (1, 1))
        out = layout.response_norm(x, torch.ones(2), torch.zeros(2), 1e-6)
        assert torch.allclose(out.float(), torch.tensor(600.0))

    def test_scale_of_zeros(self):
        assert torch.equal(response_scale(torch.zeros(1, 3), torch.ones(3), 1e-6), torch.ones(1, 3))


def test_blocks_are_entered_as_modules_in_every_layout():
    model = small_model(image_size=64, mask_ratio=0.5)
    entered = []
    for stage in model.encoder.stages:
        for block in stage.blocks:
            block.register_forward_hook(lambda module, arguments, output: entered.append(module))
    for layout in ("packed", "masked"):
        entered.clear()
        model.layout = layout
        model.encode(torch.randn(1, 3, 64, 64, dtype=torch.float64), model.draw_visible(1))
        assert len(entered) == 5


def test_compiled_block_equals_eager():
    assert_compiled_equals_eager("packed")


def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="needs blocks with exact GELU, as published; these have SiLU"):
        adopt_blocks(timm.create_model("convnextv2_atto", act_layer="silu"))
    with pytest.raises(ValueError, match="needs ConvNeXt V2 blocks"):
        adopt_blocks(timm.create_model("convnext_atto"))
