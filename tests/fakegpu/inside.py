"""What tests run in a process with a simulated GPU: `inside.py FUNCTION ARGUMENTS`, JSON in and out."""

import ctypes
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import repeat
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import torch.distributed as dist
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch.distributed import distributed_c10d

from dino_sparo.check.counting import Operators
from dino_sparo.cli.pretraining import PretrainOptions
from dino_sparo.data.color import blur_taps
from dino_sparo.data.device_views import Photos, collate_photos, numbers_of
from dino_sparo.data.loader import PhotoBatch, crops_of, prepare_device
from dino_sparo.data.views import crop_kinds, draw_view
from dino_sparo.models.backbone import run_block
from dino_sparo.parallel.device import compiled
from dino_sparo.parallel.precision import set_numerics
from dino_sparo.recipe.files import named_recipe
from dino_sparo.runs.runlog import RunLog, read_metrics
from dino_sparo.training import steps as training_steps
from dino_sparo.training.periodic import log_step
from dino_sparo.training.pretrain import prepare, step_of
from dino_sparo.training.setup import build_schedules
from dino_sparo.training.steps import EAGER_STEPS, Steps
from tests.tiny import build_state, parse_options, tiny_arguments

counters = ctypes.CDLL("libcuda.so.1")
for name in ("fakegpu_launches", "fakegpu_waits", "fakegpu_copies"):
    getattr(counters, name).restype = ctypes.c_long

STEPS = 3


def full_step(
    precision: str = "bf16",
    images: int = 64,
    processes: int = 1,
    activation_checkpointing: bool = False,
    deterministic: bool = False,
    accumulation: int = 1,
    capture: bool = False,
    wait: bool = False,
    operators: bool = False,
    compiles: bool = False,
) -> dict:
    """Launches and waits of the host in a step of the paper's experiment, and its peak memory; `eager` of one
    before any is captured.

    Of `processes`, this is the first; the simulated NCCL needs no others. `wait` puts one into the step.
    `operators` counts bytes and FLOP of those that run. A step is captured if `capture`.
    """
    if processes > 1:
        distributed_c10d._store_based_barrier = lambda *_, **__: None
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=processes)
        training_steps.sum_over_ranks = lambda values: values  # no others to vote
    recipe = parse_options(
        PretrainOptions, ["--config", "imagenet_vits16_sparo", "--data.path", "x", "--run_dir", "x"]
    )
    device = torch.device("cuda", 0)
    set_numerics(tf32=False, deterministic=deterministic)
    state = build_state(
        *(recipe, device),
        loss_scaling=precision == "fp16",
        activation_checkpointing=activation_checkpointing,
        compiled=compiles,
    )
    hyper = build_schedules(recipe.optim, recipe.loss, 2500).at(5000)
    crops = [torch.zeros(count, images, 3, side, side, device=device) for count, side in ((2, 224), (8, 96))]

    step_of_state = step_of(state, clip_norm=3.0, precision=precision)

    def step_that_may_wait(*args, **kwargs):
        if wait:
            crops[0].sum().item()
        return step_of_state(*args, **kwargs)

    steps = Steps(step_that_may_wait, device, accumulation, capture=capture)

    def step():
        torch.manual_seed(0)
        steps.take(repeat(crops), hyper, logged=False)

    for _ in range(EAGER_STEPS - 1):  # which set things up
        step()
    torch.cuda.reset_peak_memory_stats()
    eager = cost_of(step, 1)
    torch.cuda.reset_peak_memory_stats()
    step()  # which is captured, if any is
    found = cost_of(step, STEPS) | {"eager": eager}
    if operators:
        with Operators() as counted:
            step()
        found |= {"bytes": counted.bytes, "flops": counted.flops}
    return found | {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def cost_of(step: Callable[[], None], number: int) -> dict:
    """Of one of so many steps, and the peak of memory."""
    counters.fakegpu_reset()
    for _ in range(number):
        step()
    return {
        "launches": counters.fakegpu_launches() / number,
        "waits": counters.fakegpu_waits() / number,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "calls": calls(number),
    }


def bytes_of_block() -> dict[str, float]:
    """GB that a block of ViT-S/16 moves for 64 images in bf16: of the teacher, and of the student with its
    backward pass, as operators and compiled. Compiled code is counted by Inductor."""
    device, crops = torch.device("cuda", 0), [torch.Size((128, 197, 384)), torch.Size((512, 37, 384))]
    recipe = named_recipe("imagenet_vits16_sparo", {"data.path": "x"})
    block = build_state(recipe, device).student.encoder.backbone.blocks[1]
    weights = {
        name: weight.detach().to(torch.float32 if "norm" in name else torch.bfloat16)
        for name, weight in block.named_parameters()
    }
    of_graphs: list[int] = []
    compile_to_module = GraphLowering.compile_to_module

    def counting(graph):
        module = compile_to_module(graph)
        of_graphs.append(graph.count_bytes()[0])
        return module

    GraphLowering.compile_to_module = counting
    inductor_config.force_disable_caches = True  # a cached graph is not counted

    rows = torch.zeros(sum(shape[0] * shape[1] for shape in crops), 384, device=device)
    scale, tokens, gradient = rows[:, :1].clone(), torch.zeros(crops[0], device=device), rows.clone()

    def student(run):
        of_step = {name: weight.requires_grad_() for name, weight in weights.items()}
        with torch.autocast("cuda", torch.bfloat16):
            output = run(block, of_step, rows.requires_grad_(), crops, (scale, scale), recompute=False)
        output.backward(gradient)

    def teacher(run):
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            run(block, weights, tokens, None, (None, None), recompute=False)

    found = {}
    for of_model in (teacher, student):
        with Operators() as counted:
            of_model(run_block)
        of_graphs.clear()
        of_model(compiled(run_block, dynamic=False))
        name = of_model.__name__
        found |= {name: counted.bytes / 1e9, f"{name} compiled": sum(of_graphs) / 1e9}
    return found


def captured_steps(frozen: list[str]) -> list[bool]:
    """For each step of a small run, of which something is frozen or not (""), whether it is a replay."""
    device = torch.device("cuda", 0)
    recipe = parse_options(PretrainOptions, tiny_arguments("x", "x"))
    state = build_state(recipe, device)
    crops = [torch.zeros(2, 4, 3, side, side, device=device) for side in (16, 8)]
    step = step_of(state, clip_norm=3.0, precision="bf16")
    steps, replays = Steps(step, device, 1, capture=True), []
    nothing = build_schedules(recipe.optim, recipe.loss, 10).at(15)
    for what in frozen:
        counters.fakegpu_reset()
        hyper = replace(nothing, **({f"freeze_{what}": True} if what else {}))
        steps.take(repeat(crops), hyper, logged=False)
        replays.append(calls(1)["graph"] > 0)
    return replays


def log_entry(data: str, run_dir: str) -> dict:
    """Waits and launches of an entry of the paper's experiment in the log, without slots."""
    Path(run_dir).mkdir()
    recipe = parse_options(
        PretrainOptions,
        f"--config=imagenet_vits16_sparo --data.path={data} --run_dir={run_dir} --optim.global_batch_size=8 "
        "--monitor.knn_every_epochs=0 --machine.num_workers=0 --log.log_every_steps=1 "
        "--machine.precision=bf16".split(),
    )
    device = torch.device("cuda", 0)
    run = prepare(recipe, Path(run_dir), device)
    crops = [torch.zeros(count, 8, 3, side, side, device=device) for count, side in ((2, 224), (8, 96))]
    step_of_run = step_of(run.state, clip_norm=3.0, precision=run.precision)
    steps, hyper = Steps(step_of_run, device, 1, capture=False), run.schedules.at(100)
    with RunLog(Path(run_dir), first_step=0, steps_per_epoch=3, total_steps=300) as run_log:
        for step in (1, 4, 7, 10, 13, 16, 19):  # not the last one of an epoch
            output = steps.take(repeat(crops), hyper, logged=True)
            counters.fakegpu_reset()
            log_step(run, run_log, step, hyper, output)
            run_log.step_done(step)
            waits, launches = counters.fakegpu_waits(), counters.fakegpu_launches()
    entries = [entry["step"] for entry in read_metrics(Path(run_dir))]
    return {"waits": waits, "launches": launches, "entries": entries}


def views(images: int) -> dict:
    """Graphs compiled for the views of the paper's experiment: before the first batch, and in all.

    Batches are of images of many sizes; launches, waits of the host and peak memory are those of the last.
    """
    kinds = crop_kinds(**asdict(named_recipe("imagenet_vits16_sparo", {"data.path": "x"}).views))
    device = torch.device("cuda", 0)
    graphs = torch._dynamo.utils.counters["stats"]
    prepare_device(kinds, "device", images, device)
    prepared = graphs["unique_graphs"]
    taps = max(blur_taps(kind.blur_radius[1]) for kind in kinds)
    for sizes in [(500, 375)], [(96, 96)], [(224, 512)], [(500, 500), (224, 224)], [(1024, 1024)]:
        loaded = []
        for number in range(images):
            height, width = sizes[number % len(sizes)]
            size = {"image_width": width, "image_height": height}
            drawn = [
                draw_view(kind, seed=0, epoch=0, sample=number, crop=crop, **size)
                for crop, kind in enumerate(kinds)
            ]
            pixels = torch.zeros(height, width, 3, dtype=torch.uint8)
            loaded.append((pixels, [numbers_of(view, taps) for view in drawn]))
        batch = PhotoBatch(Photos(*(values.pin_memory() for values in collate_photos(loaded))))
        torch.cuda.reset_peak_memory_stats()
        counters.fakegpu_reset()
        crops_of(batch, kinds, device)
    return {
        "prepared": prepared,
        "graphs": graphs["unique_graphs"],
        "launches": counters.fakegpu_launches(),
        "waits": counters.fakegpu_waits(),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def calls(steps: int) -> Counter:
    """Calls a step by kind since the last reset: launch, and of nodes of graphs kernel, gemm, nccl, ..."""
    found = Counter()
    with NamedTemporaryFile("r") as dump:
        counters.fakegpu_dump(dump.name.encode())
        for line in dump:
            _, kind, number, _ = line.split("\t", 3)
            found[kind] += int(number) / steps
    return found


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
