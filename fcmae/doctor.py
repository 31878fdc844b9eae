"""Check machine, shards, images and the speed of loading before a long run does: `python -m fcmae.doctor data.train=…`.

It takes the settings of `fcmae.pretrain`, so that a command's can be checked as they are. This file stays free of
torch; `fcmae.checkup` does the work.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import hydra
from omegaconf import DictConfig

from fcmae.configuration import conf_dir, launch, run
from fcmae.settings import PretrainConfig, launched_ranks, require


@dataclass
class DoctorConfig(PretrainConfig):
    """images: how many of each split are drawn at random, read and decoded; 0 for all. seconds: how long training
    batches are loaded to measure their speed, 0 for not at all."""

    images: int = 1000
    seconds: float = 10.0

    def validate(self) -> None:
        require(self.images >= 0, "images", self.images, "must be at least 0 (0 for all)")
        require(self.seconds >= 0, "seconds", self.seconds, "must be at least 0")
        self.model.validate()
        self.run.validate()
        self.tracking.validate()
        self.optim.validate(launched_ranks())
        self.data.validate_settings(self.model.in_chans)


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="doctor")
def hydra_main(composed: DictConfig) -> None:
    run(composed, DoctorConfig, examine)


def examine(config: DoctorConfig) -> None:
    from fcmae.checkup import examine

    sys.exit(0 if examine(config) else 1)


def main() -> None:
    launch(hydra_main, DoctorConfig)


if __name__ == "__main__":
    main()
