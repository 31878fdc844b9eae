"""Draw what a pretrained model reconstructs: `python -m fcmae.visualize checkpoint=<run folder> [key=value ...]`.

Each image is shown as original | masked | reconstruction, de-normalised, with visible patches pasted back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from fcmae.configuration import conf_dir, launch, run, to_dataclass
from fcmae.errors import CheckpointError, ConfigError
from fcmae.recorded import recorded_settings
from fcmae.settings import DataConfig, ModelConfig, PretrainConfig, check_device, require


@dataclass
class VisualizeConfig:
    """Everything `python -m fcmae.visualize` takes; what is null is taken from the run behind `checkpoint`."""

    checkpoint: str = "runs/demo/pretrain"
    shards: str | None = None
    output: str = "reconstructions.png"
    count: int = 12
    mask_ratio: float | None = None
    seed: int = 0
    device: str = "auto"
    debug: bool = False

    def validate(self) -> None:
        require(self.count >= 1, "count", self.count, "must be at least 1")
        require(self.output.endswith(".png"), "output", self.output, "must end in .png")
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be an integer in [0, 2^32)")
        check_device("device", self.device)
        if self.mask_ratio is not None:
            require(0 < self.mask_ratio < 1, "mask_ratio", self.mask_ratio, "must be greater than 0 and less than 1")
        recorded = recorded_settings(self.checkpoint)
        if "optim" not in recorded or "decoder_dim" not in recorded.get("model", {}):
            raise CheckpointError(
                f"checkpoint={self.checkpoint}: must be a run or checkpoint folder of fcmae.pretrain, "
                "which holds the decoder"
            )
        self.model, split = of_run(recorded)
        self.model.layout = ModelConfig().layout  # the same picture, without the library the run's own may need
        if self.mask_ratio is not None:
            self.model.mask_ratio = self.mask_ratio
        self.model.validate()
        self.source = split
        if self.shards is not None:
            self.source = DataConfig(train=self.shards, val=None, mean=split.mean, std=split.std)
        self.source.validate(self.model.in_chans, batch_size=1)

    # What validation finds out for the rest; not settings.
    def __post_init__(self) -> None:
        self.model = ModelConfig()
        self.source = DataConfig()


def of_run(recorded: dict[str, Any]) -> tuple[ModelConfig, DataConfig]:
    """Model and data of a recorded pretraining run."""
    config = to_dataclass({k: v for k, v in recorded.items() if k in ("model", "data")}, PretrainConfig)
    return config.model, config.data


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="visualize")
def hydra_main(composed: DictConfig) -> None:
    run(composed, VisualizeConfig, visualize)


def visualize(config: VisualizeConfig) -> None:
    """Write the picture `config` asks for."""
    from fcmae.data.reader import ShardReader
    from fcmae.data.splits import open_split
    from fcmae.pictures import write_reconstructions
    from fcmae.pretraining import build_model
    from fcmae.runtime.checkpoint import find_checkpoint, load
    from fcmae.runtime.distributed import ranks

    with ranks(config.device) as me:
        model = build_model(config.model).to(me.device)
        folder = find_checkpoint(config.checkpoint)
        if folder is None:
            raise CheckpointError(f"checkpoint={config.checkpoint}: holds no complete checkpoint")
        step = load(folder, model)
        index = open_split(config.source, "val", me) or open_split(config.source, "train", me)
        assert index is not None
        reader = ShardReader(index, config.source.storage)
        mean, std = config.source.statistics(config.model.in_chans)
        output = Path(config.output)
        try:
            skip = config.source.on_error == "skip"
            write_reconstructions(
                model, reader, output, mean=mean, std=std, seed=config.seed, count=config.count, skip=skip
            )
        except OSError as error:
            raise ConfigError("output", output, f"cannot be written: {error.strerror}") from error
    print(f"{output}: {min(config.count, len(index))} images of {index.origin}, model of step {step:,}")


def main() -> None:
    launch(hydra_main, VisualizeConfig)


if __name__ == "__main__":
    main()
