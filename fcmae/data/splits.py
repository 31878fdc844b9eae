"""A split by its setting, a folder of shards or the demo, rendered on first use; and how it divides into batches."""

from __future__ import annotations

from fcmae.data.demo import ensure_demo
from fcmae.data.faults import Faults
from fcmae.data.index import ShardIndex, read_index
from fcmae.data.order import BatchPlan
from fcmae.errors import DataError
from fcmae.files import cache_folder
from fcmae.runtime.distributed import Ranks
from fcmae.runtime.progress import Display
from fcmae.settings import DEMO, DataConfig, OptimConfig


def open_split(data: DataConfig, name: str, ranks: Ranks) -> ShardIndex | None:
    """The index of `train` or `val`; None if the split is not there. All ranks call it together."""
    source = data.split(name)
    if source is None:
        return None
    if source != DEMO:
        return read_index(source, data.storage)
    if ranks.main:
        try:
            ensure_demo()
        except OSError as error:
            raise DataError(
                f"data.{name}={DEMO}: its images cannot be written below {cache_folder()} ({error.strerror}); "
                "set XDG_CACHE_HOME to a folder that can"
            ) from error
    ranks.barrier()
    return read_index(ensure_demo() / name)


def open_faults(data: DataConfig, display: Display) -> Faults | None:
    """How samples that cannot be used are counted; None if the first is to end the run."""
    if data.on_error == "raise":
        return None
    return Faults(data.max_bad_fraction, display.say) if display.active else Faults(data.max_bad_fraction)


def plan_batches(index: ShardIndex, data: DataConfig, optim: OptimConfig, seed: int, ranks: Ranks) -> BatchPlan:
    """Which images form which step, and which of them are this rank's."""
    return BatchPlan(
        index.shard_samples, optim.batch_size, optim.accumulate, ranks.rank, ranks.count, seed, data.block_shards
    )
