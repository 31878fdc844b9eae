"""Small models, and how the layouts run on them are compared."""

from __future__ import annotations

import torch
from timm.layers import DropPath

from fcmae.model import create_model


def randomise(model: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Give every parameter a value at which it matters; fresh ones have zero GRN and biases."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * scale
        )


def small_model(dtype: torch.dtype = torch.float64, **options):
    torch.manual_seed(0)
    model = create_model("mini", dims=(6, 10, 12, 14), decoder_dim=10, **options).to(dtype)
    randomise(model)
    return model


def loss_and_gradients(model, images, visible, layout):
    model.layout = layout
    model.zero_grad()
    output = model(images, visible)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return output, gradients


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def drop_half_of_the_images(model: torch.nn.Module) -> None:
    """Stochastic depth at every block, at a rate at which it matters."""
    for stage in model.encoder.stages:
        for block in stage.blocks:
            block.drop_path = DropPath(0.5)


def assert_compiled_equals_eager(layout: str) -> None:
    model = small_model(torch.float32, image_size=64, mask_ratio=0.5)
    images, visible = torch.randn(2, 3, 64, 64), model.draw_visible(2)
    expected, gradients = loss_and_gradients(model, images, visible, layout)
    for stage in model.encoder.stages:
        for block in stage.blocks:
            block.compile(backend="aot_eager")
    actual, actual_gradients = loss_and_gradients(model, images, visible, layout)
    assert relative(actual.loss, expected.loss) < 1e-5
    for name, gradient in gradients.items():
        assert relative(actual_gradients[name], gradient) < 1e-4, name


CASES = [
    {"image_size": (96, 64)},
    {"image_size": 64, "patch_size": 16, "stem_stride": 2},
    {"image_size": (24, 40), "patch_size": 8, "stem_stride": 1, "in_chans": 1},
    {"image_size": 128, "patch_size": 64, "in_chans": 5},
    {"image_size": (32, 48), "patch_size": 16, "stem_stride": 1, "mask_ratio": 0.5, "norm_pix_loss": False},
    {"image_size": 32, "patch_size": 16, "stem_stride": 2, "mask_ratio": 0.75, "decoder_depth": 2},
]
