"""Pretrain an FCMAE: `python -m fcmae.pretrain [key=value ...]`, or under `torchrun`.

This file stays free of torch, so that a mistyped option is answered at once; `fcmae.pretraining` does the work.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from fcmae.configuration import conf_dir, launch, run
from fcmae.settings import PretrainConfig


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="pretrain")
def hydra_main(composed: DictConfig) -> None:
    run(composed, PretrainConfig, pretrain)


def pretrain(config: PretrainConfig) -> None:
    from fcmae.pretraining import pretrain

    pretrain(config)


def main() -> None:
    launch(hydra_main, PretrainConfig)


if __name__ == "__main__":
    main()
