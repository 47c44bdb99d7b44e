"""Running training steps eagerly, or on a GPU as replays of one CUDA graph.

A step launches about a thousand kernels, for which the CPU may need longer than a fast GPU needs to run them.
A CUDA graph launches them at once. It has its own input and output tensors: crops and hyperparameters are
copied into them, and each step overwrites the output of the previous one. Random numbers equal those of eager
steps, because a replay reads seed and offset of torch's generator.
"""

import gc
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dino_sparo.parallel.device import end_of_work, wait_for_event
from dino_sparo.parallel.distributed import sum_over_ranks
from dino_sparo.terminal import log
from dino_sparo.training.monitor import TeacherStatistics
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.state import StepOutput

STEPS_AHEAD = 2  # steps queued on the GPU; more would only fill its memory with batches
EAGER_STEPS = 3  # steps without frozen parts before a capture: they load kernels and create optimizer state
NUMBERS = ("lr", "weight_decay", "momentum", "teacher_temp")


class Steps:
    """Runs the training steps.

    With `capture`, steps on a GPU are replays of a CUDA graph, except those with a frozen last layer or
    backbone and the first three after them. If a process cannot capture, all continue with eager steps and
    log a warning.

    Args:
        step: `train_step`; it is called with micro-batches, their number, hyperparameters and statistics.
        device: of the state.
        accumulation: micro-batches per step.
        capture: whether to capture the step.
    """

    def __init__(
        self, step: Callable[..., StepOutput], device: torch.device, accumulation: int, *, capture: bool
    ) -> None:
        self._step, self._device, self._accumulation = step, device, accumulation
        self._on_gpu = device.type == "cuda"
        self._capture, self._taken = capture and self._on_gpu, 0
        self._numbers = torch.zeros(len(NUMBERS), dtype=torch.float64, device=device)
        self._ends: deque[torch.cuda.Event | None] = deque()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: StepOutput | None = None  # of the graph
        self._inputs: list[list[Tensor]] = []  # of the graph, by micro-batch and size of crops
        if capture and not self._on_gpu:
            log.info("machine.capture has no effect on the %s", device.type)

    def take(
        self, micro_batches: Iterator[list[Tensor]], hyper: Hyperparameters, *, logged: bool
    ) -> StepOutput:
        """Run the next step; with `logged` its output has statistics.

        Raises:
            StuckError: the GPU has not finished a step for 30 minutes.
        """
        if not self._on_gpu:
            return self._eagerly(micro_batches, hyper, logged=logged)
        hyper = self._on_device(hyper)
        self._taken = 0 if hyper.freeze_last_layer or hyper.freeze_backbone else self._taken + 1
        if self._capture and self._taken > EAGER_STEPS:
            output = self._replayed([next(micro_batches) for _ in range(self._accumulation)], hyper)
        else:
            output = self._eagerly(micro_batches, hyper, logged=logged)
        self._ends.append(end_of_work(self._device))
        if len(self._ends) > STEPS_AHEAD:
            wait_for_event(self._ends.popleft())
        return output

    @property
    def captured(self) -> bool:
        """Whether steps are replays of a CUDA graph."""
        return self._graph is not None

    def close(self) -> None:
        """Free the graph; otherwise NCCL cannot destroy the process group that it uses."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None

    def _eagerly(
        self, micro_batches: Iterator[list[Tensor]], hyper: Hyperparameters, *, logged: bool
    ) -> StepOutput:
        statistics = TeacherStatistics() if logged else None
        return self._step(micro_batches, self._accumulation, hyper, statistics=statistics)

    def _on_device(self, hyper: Hyperparameters) -> Hyperparameters:
        """Hyperparameters as scalars on the GPU, by one asynchronous copy."""
        values = torch.tensor([getattr(hyper, name) for name in NUMBERS], dtype=torch.float64)
        self._numbers.copy_(values.pin_memory(), non_blocking=True)
        on_device: dict[str, Any] = dict(zip(NUMBERS, self._numbers.unbind(), strict=True))
        return replace(hyper, **on_device)

    def _replayed(self, batches: list[list[Tensor]], hyper: Hyperparameters) -> StepOutput:
        if self._graph is None and not self._captured(batches, hyper):
            return self._eagerly(iter(batches), hyper, logged=True)
        for inputs, groups in zip(self._inputs, batches, strict=True):
            torch._foreach_copy_(inputs, groups)
        assert self._graph is not None and self._output is not None
        self._graph.replay()
        return self._output

    def _captured(self, batches: list[list[Tensor]], hyper: Hyperparameters) -> bool:
        """Capture a step for batches of these shapes, without running it; whether all processes could."""
        graph, reason = torch.cuda.CUDAGraph(), ""
        stream = torch.cuda.current_stream(self._device)
        self._inputs = [[torch.empty_like(group) for group in groups] for groups in batches]
        try:  # "thread_local": other threads, which load images, may use CUDA meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._output = self._eagerly(iter(self._inputs), hyper, logged=True)
        except RuntimeError as error:  # an error of CUDA, or out of memory
            reason = str(error.__context__ or error).split("\n")[0] or "unknown reason"
        finally:
            torch.cuda.set_stream(stream)  # after a failure torch stays in the stream of the capture
        failed = int(sum_over_ranks(torch.tensor([int(bool(reason))])))
        if not failed:
            self._graph = graph
            return True
        self._capture, self._inputs, self._output = False, [], None
        del graph
        gc.collect()  # frees its memory, to which the traceback of the error refers
        log.warning(
            "WARNING: the training step could not be captured as a CUDA graph in %d processes (%s); the run "
            "continues with eager steps, which are slower",
            *(failed, reason or "no error in this process"),
        )
        return False
