"""Writing checkpoints beside the training: a thread writes a copy of the state."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from dino_sparo.parallel.processes import finished_first
from dino_sparo.runs.checkpoint import save_checkpoint


class Saver:
    """Writes the checkpoints of a run, one at a time; what is left is written when it is closed.

    Args:
        run_dir: folder of the run.
        keep_every_steps: as for `save_checkpoint`.
        saved: the step of the checkpoint that the run goes on from, 0 without one.
    """

    def __init__(self, run_dir: Path, keep_every_steps: int, saved: int) -> None:
        self.run_dir, self.keep_every_steps, self.saved = run_dir, keep_every_steps, saved
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future | None = None
        self._finished_first = finished_first(self._finish)

    def __enter__(self) -> "Saver":
        self._finished_first.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        self._finished_first.__exit__(kind, error, trace)
        if error is None:
            self.wait()

    def save(self, state: dict[str, Any], step: int) -> None:
        """Copy the state and go on; waits for the checkpoint before, if that is still being written.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        if step == self.saved > 0:
            return
        self.saved = step
        copy = _copied(state)
        self._writing = self._thread.submit(
            save_checkpoint, copy, self.run_dir, step=step, keep_every_steps=self.keep_every_steps
        )

    def wait(self) -> None:
        """Until the last checkpoint is on disk.

        Raises:
            UserError: it could not be written.
        """
        if self._writing is not None:
            self._writing.result()

    def _finish(self, seconds: float) -> None:
        if self._writing is not None:
            wait([self._writing], timeout=seconds)

    def check(self) -> None:
        """Raise what went wrong with the last checkpoint, if that is known; waits for nothing."""
        if self._writing is not None and self._writing.done():
            self._writing.result()


def _copied(value: Any) -> Any:
    """A copy on the CPU, of tensors and of the dictionaries and lists that hold them."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    return value
