"""Fine-tune an encoder as a dense classifier: `python -m finetune.train checkpoint=<run folder> [key=value ...]`.

This file stays free of torch, so that a mistyped option is answered at once; `finetune.training` does the work.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from fcmae.configuration import conf_dir, launch, run
from finetune.settings import FinetuneConfig


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="finetune")
def hydra_main(composed: DictConfig) -> None:
    run(composed, FinetuneConfig, finetune)


def finetune(config: FinetuneConfig) -> None:
    from finetune.training import finetune

    finetune(config)


def main() -> None:
    launch(hydra_main, FinetuneConfig)


if __name__ == "__main__":
    main()
