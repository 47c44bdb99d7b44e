"""The time of training on this machine by stage, compared with plain code.

Axis letters: B images, C crops.
"""

import platform
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_sparo.bench.loading import IMAGE_STAGES, end_to_end, image_stages
from dino_sparo.bench.plain import PlainState, PlainViews, plain_batches, plain_state, plain_step
from dino_sparo.bench.timing import host_waits, interleaved, profiled, range_seconds, spread, spread_of_ratios
from dino_sparo.check.counting import GPUS, find_gpu
from dino_sparo.check.measure import count_flops, measured_peak
from dino_sparo.data.device_views import Photos
from dino_sparo.data.loader import (
    BatchOrder,
    CropsDataset,
    PhotoBatch,
    collate_crops,
    crop_batches,
    crops_of,
    crops_on_device,
    normalized,
)
from dino_sparo.data.views import crop_sizes
from dino_sparo.models.cost import bytes_saved_for_backward
from dino_sparo.parallel.device import wait_for
from dino_sparo.parallel.precision import autocast
from dino_sparo.parallel.processes import cores
from dino_sparo.terminal import log
from dino_sparo.training.pretrain import step_of
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.state import TrainState
from dino_sparo.training.steps import EAGER_STEPS, Steps

VIEWED_IMAGES = 16  # least number of images for times per image
EPOCHS = 1_000_000  # more than any benchmark needs


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The training to measure."""

    new_state: Callable[[torch.device], TrainState]
    """Returns a new initial state."""
    dataset: CropsDataset
    hyper: Hyperparameters
    clip_norm: float
    device: torch.device
    precision: str
    batch_size: int
    num_workers: int
    prefetch_batches: int
    timeout_seconds: float
    """Time limit of a batch."""

    def our_step(self, state: TrainState, groups: list[Tensor]) -> None:
        """One training step on groups of normalized crops."""
        self._steps(state, capture=False).take(repeat(groups), self.hyper, logged=False)

    def captured_step(self, state: TrainState, groups: list[Tensor]) -> Callable[[], object] | None:
        """The same step as a CUDA graph, for repeated calls; None if it cannot be captured."""
        steps = self._steps(state, capture=True)
        step = partial(steps.take, repeat(groups), self.hyper, logged=False)
        for _ in range(EAGER_STEPS + 1):
            step()
        return step if steps.captured else None

    def _steps(self, state: TrainState, *, capture: bool) -> Steps:
        step = step_of(state, clip_norm=self.clip_norm, precision=self.precision)
        return Steps(step, self.device, 1, capture=capture)

    def our_batches(self) -> Generator[list[Tensor]]:
        """Endless groups of normalized crops (C_i, B, 3, side, side) on the device, as in training."""
        order = BatchOrder(
            num_samples=len(self.dataset.source),
            global_batch_size=self.batch_size,
            epochs=EPOCHS,
            seed=self.dataset.seed,
        )
        loader = crop_batches(
            *(self.dataset, order),
            num_workers=self.num_workers,
            prefetch_batches=self.prefetch_batches,
            pin_memory=self.device.type == "cuda",
            timeout_seconds=self.timeout_seconds,
        )
        with loader.failures_explained():
            for crops in crops_on_device(iter(loader), self.dataset.crop_kinds, self.device):
                yield normalized(crops)

    def new_plain_state(self, device: torch.device) -> PlainState:
        """A new initial state of plain code."""
        state = self.new_state(device)
        return plain_state(
            *(state.student, state.teacher, state.loss_fn.center),
            student_temp=state.loss_fn.student_temp,
            center_momentum=state.loss_fn.center_momentum,
            loss_scaling=state.loss_scale.enabled,
        )

    def plain_step(self, state: PlainState, groups: list[Tensor]) -> None:
        """The same step by plain code."""
        mixed = autocast(self.precision, self.device)
        numbers = {name: value for name, value in vars(self.hyper).items() if name != "freeze_backbone"}
        plain_step(state, groups, **numbers, clip_norm=self.clip_norm, autocast=mixed)

    def plain_batches(self) -> Generator[list[Tensor]]:
        """Batches by plain code, with the same number of workers."""
        return plain_batches(
            PlainViews(self.dataset.source, self.dataset.crop_kinds),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            prefetch_batches=self.prefetch_batches,
            device=self.device,
        )

    def photos(self) -> PhotoBatch:
        """The first images, decoded, and the random numbers of their views, as workers return them."""
        of, size = self.dataset, len(self.dataset.source)
        dataset = CropsDataset(of.source, of.crop_kinds, of.seed, executor="device", max_side=of.max_side)
        batch = collate_crops([dataset[0, number % size] for number in range(self.batch_size)])
        assert isinstance(batch, PhotoBatch)
        if self.device.type == "cpu":
            return batch
        return PhotoBatch(Photos(*(values.pin_memory() for values in batch.photos)))


def measure(
    bench: Bench,
    *,
    rounds: int,
    seconds: float | None = None,
    compare: bool = False,
) -> dict[str, Any]:
    """Measure training on this machine; returns the JSON object of `dino-sparo bench --json`.

    Args:
        rounds: number of measurements of each stage and step; their medians are reported.
        seconds: duration of training end to end. None: not measured.
        compare: also measure plain code, in interleaved rounds.
    """
    device, batch_size = bench.device, bench.batch_size
    log.info("views")
    of_images = image_stages(bench.dataset, max(rounds, VIEWED_IMAGES))
    stages = {name: spread(times, 1) for name, times in of_images.items()}
    make = partial(crops_of, bench.photos(), bench.dataset.crop_kinds, device)
    stages["views on the device"] = spread(interleaved({"": make}, rounds, device)[""], batch_size)
    groups = normalized(make())

    log.info("steps")
    implementations: dict[str, tuple[Callable, Callable, Callable]] = {
        "ours": (bench.new_state, bench.our_step, bench.our_batches)
    }
    if compare:
        implementations["plain"] = (bench.new_plain_state, bench.plain_step, bench.plain_batches)
    steps, memory = {}, {}
    for who, (new_state, step, _) in implementations.items():
        state, memory[who] = _state_and_memory(new_state, step, groups)
        steps[who] = partial(step, state)
    to_time: dict[str, Callable[[], object]] = {k: partial(step, groups) for k, step in steps.items()}
    if device.type == "cuda" and (captured := bench.captured_step(steps["ours"].args[0], groups)):
        to_time["captured"] = captured
    times = interleaved(to_time, rounds, device)
    one_step = partial(steps["ours"], groups)
    profiles = [profiled(one_step, 1, device) for _ in range(rounds + 1)][1:]  # the first warms up
    of_ranges = [range_seconds(events, device.type) for events in profiles]
    for name in of_ranges[0]:
        stages[name] = spread([seconds_of[name] for seconds_of in of_ranges], batch_size)
    stages["whole step"] = spread(times["ours"], batch_size)
    if "captured" in times:
        stages["whole step, captured"] = spread(times["captured"], batch_size)

    from_files = {}
    if seconds is not None:
        for who, (_, _, batches) in implementations.items():
            log.info("end to end, %s", who)
            from_files[who] = end_to_end(
                *(batches(), steps[who]),
                prefetched=bench.num_workers * bench.prefetch_batches,
                batch_size=batch_size,
                seconds=seconds,
                device=device,
            )
    return _machine(bench) | {
        **{"rounds": rounds, "seconds": seconds, "stages": stages, "memory": memory},
        "host_waits_per_step": host_waits(profiles[-1]),
        "end_to_end": from_files.get("ours"),
        **_utilization(bench, {"step": stages["whole step"], "end_to_end": from_files.get("ours")}),
        "compare": _compared(times, memory, from_files, batch_size) if compare else None,
    }


def _state_and_memory(
    new_state: Callable[[torch.device], Any], step: Callable[[Any, list[Tensor]], None], groups: list[Tensor]
) -> tuple[Any, dict[str, int | None]]:
    """A new state; the peak GPU memory of the state, its first steps, and their crops (None on a CPU); the
    bytes that a step saves for backward."""
    device, peak = groups[0].device, None
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device) - sum(group.nbytes for group in groups)
    state = new_state(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(2):  # the first step creates the optimizer state
            step(state, groups)
        wait_for(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    saved = bytes_saved_for_backward(partial(step, state), groups)
    return state, {"peak_bytes": peak, "saved_bytes": saved}


def _compared(
    times: dict[str, list[float]],
    memory: dict[str, dict[str, Any]],
    from_files: dict[str, dict[str, float]],
    batch_size: int,
) -> dict[str, Any]:
    """Ratios plain / ours of time and memory, ours / plain of end-to-end speed; above 1 ours is better."""
    end_to_end = None
    if from_files:
        end_to_end = from_files["ours"]["images_per_second"] / from_files["plain"]["images_per_second"]
    return {
        "plain_step": spread(times["plain"], batch_size),
        "step": spread_of_ratios(times["plain"], times["ours"]),
        "memory": {k: v / memory["ours"][k] for k, v in memory["plain"].items() if v is not None},
        "plain_end_to_end": from_files.get("plain"),
        "end_to_end": end_to_end,
    }


def _utilization(bench: Bench, speeds: dict[str, dict[str, float] | None]) -> dict[str, Any]:
    """FLOPs per image, peak FLOP/s of this device, and for each of `speeds` the fraction of the peaks."""
    counted = bench.new_state(torch.device("cpu")).student
    counted.encoder.backbone.activation_checkpointing = False  # recomputed FLOPs do not count
    flops = count_flops(counted, crop_sizes(bench.dataset.crop_kinds))
    peaks = {
        "published": published_peak(bench.device, bench.precision),
        "measured": measured_peak(bench.device, bench.precision),
    }
    return {
        "flops_per_image": flops,
        "peak_flops": peaks,
        "utilization": {
            what: {
                name: speed["images_per_second"] * flops / peak
                for name, peak in peaks.items()
                if peak is not None
            }
            for what, speed in speeds.items()
            if speed is not None
        },
    }


def published_peak(device: torch.device, precision: str) -> float | None:
    """Published FLOP/s of this GPU in half precision; None if they are unknown."""
    if device.type != "cuda" or precision == "fp32":
        return None
    kind = find_gpu(torch.cuda.get_device_name(device))
    return GPUS[kind].half if kind else None


def _machine(bench: Bench) -> dict[str, Any]:
    """The machine and the settings of the measurement."""
    on_gpu = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(bench.device) if on_gpu else _processor(),
        "device_type": bench.device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "precision": bench.precision,
        "batch_size": bench.batch_size,
        "num_workers": bench.num_workers,
    }


def _processor() -> str:
    """The name of the CPU; the architecture where the system does not have it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# --- The result as text


def report(result: dict[str, Any]) -> str:
    """The result of `measure` as lines of text."""
    lines = [
        "{recipe}, batch {batch_size}, {precision}, {device}, {threads} threads, {num_workers} workers, "
        "{cores} cores, torch {torch}".format(**result),
        f"{result['data']}; read from the page cache; {result['rounds']} rounds",
        "",
        f"{'stage alone':<26}{'median ms':>11}{'10 %':>10}{'90 %':>10}{'images/s':>11}",
    ]
    for name, found in result["stages"].items():
        one_image = name in IMAGE_STAGES  # the others are for a batch
        lines.append(_row(f"{name}, one core" if one_image else name, found))
    lines += ["", f"host waits for the device per step: {_listed(result['host_waits_per_step'])}"]
    peaks = [f"{peak / 1e12:.2f} TFLOP/s {name}" for name, peak in result["peak_flops"].items() if peak]
    lines.append(
        f"{result['flops_per_image'] / 1e9:.2f} GFLOP per image; peak of matrix products: {', '.join(peaks)}"
    )
    for what, shares in result["utilization"].items():
        of_peaks = ", ".join(f"{100 * share:.1f} % of the {name} peak" for name, share in shares.items())
        lines.append(f"model FLOP utilization, {what.replace('_', ' ')}: {of_peaks}")
    for who, memory in result["memory"].items():
        peak = memory["peak_bytes"]
        of_gpu = "" if peak is None else f"peak GPU memory {peak / 2**30:.2f} GiB, "
        lines.append(f"{who}: {of_gpu}{memory['saved_bytes'] / 2**20:.1f} MiB saved for backward")
    if result["end_to_end"] is not None:
        lines.append(_end_to_end(result["end_to_end"]))
    if result["compare"] is not None:
        lines += _compared_text(result["compare"], result["rounds"])
    return "\n".join(lines)


def _compared_text(compared: dict[str, Any], rounds: int) -> list[str]:
    ratio = "{median:.2f} ({p10:.2f} to {p90:.2f})".format(**compared["step"])
    lines = ["", _row("plain: whole step", compared["plain_step"])]
    lines.append(f"plain / ours, whole step: {ratio}, {rounds} interleaved rounds")
    for name, of_memory in compared["memory"].items():
        what = {"peak_bytes": "peak GPU memory", "saved_bytes": "bytes saved for backward"}[name]
        lines.append(f"plain / ours, {what}: {of_memory:.2f}")
    if compared["end_to_end"] is not None:
        lines.append(_end_to_end(compared["plain_end_to_end"], ", plain code and views"))
        lines.append(f"ours / plain, end to end: {compared['end_to_end']:.2f}")
    return lines


def _row(name: str, found: dict[str, float]) -> str:
    numbers = "{median_ms:>11.2f}{p10_ms:>10.2f}{p90_ms:>10.2f}{images_per_second:>11.1f}"
    return f"{name:<26}{numbers.format(**found)}"


def _end_to_end(found: dict[str, float], who: str = "") -> str:
    return (
        f"end to end{who}: {found['images_per_second']:.1f} images/s, {100 * found['data_wait_share']:.1f} % "
        f"of the time waiting for data ({found['steps']} steps in {found['seconds']:.1f} s)"
    )


def _listed(waits: dict[str, float]) -> str:
    return ", ".join(f"{name} {count:g}" for name, count in waits.items() if count) or "none"
