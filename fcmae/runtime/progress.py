"""What the user sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Display:
    """Loss, learning rate, images per second and time left of a run of `total` steps."""

    def __init__(self, total: int, start: int, active: bool) -> None:
        self.total, self.active = total, active
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._started, self._start = time.monotonic(), start
        self._last_line = 0.0
        self._bar: Progress | None = None
        if active and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total, completed=start, epoch=0, text="")
            self._bar.start()

    def update(self, step: int, epoch: int, loss: float, lr: float, images_per_second: float) -> None:
        """Show the state after `step`; plain lines come every ten seconds and at the end."""
        if not self.active:
            return
        now = time.monotonic()
        left = (now - self._started) / max(step - self._start, 1) * (self.total - step)
        text = f"loss {loss:.4f}  lr {lr:.2e}  {images_per_second:,.0f} images/s  {duration(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, epoch=epoch, text=text)
        elif now - self._last_line >= 10 or step == self.total:
            self._last_line = now
            self.console.print(f"step {step}/{self.total}  epoch {epoch}  {text}")

    def say(self, message: str) -> None:
        """A line of its own, above the bar."""
        if self.active:
            self.console.print(message, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """90061 -> '1d 1h', 3700 -> '1h 01m', 75 -> '1m 15s'."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {whole % 60:02d}s"
