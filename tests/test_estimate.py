"""`dino-sparo check --gpu`: operators of a step, and estimates for GPUs that are not in this machine."""

import json

import pytest
import torch

from dino_sparo.__main__ import main
from dino_sparo.check import program
from dino_sparo.check.counting import GPUS, Operator, count_step, find_gpu, seconds_on
from dino_sparo.check.measure import count_flops
from dino_sparo.training.schedules import Hyperparameters
from tests.tiny import TINY, build_state, tiny_options, write_pictures

SIZES = [(2, 16), (2, 8)]  # of the crops of a tiny run
GPU = GPUS["h100"]


@pytest.fixture
def counted(tmp_path):
    def count(batch_size=4, accumulation=1, precision="bf16"):
        state = build_state(tiny_options(tmp_path, tmp_path / "run"))
        hyper = Hyperparameters(0.1, 0.1, 0.9, 0.04, False)
        return count_step(
            *(state, SIZES, batch_size, accumulation, hyper), clip_norm=3.0, precision=precision
        )

    return count


@pytest.fixture
def estimated(capsys):
    def check(*arguments, status=0):
        given = [f"--{key}={value}" for key, value in TINY.items()]
        assert main(["check", "--config", "demo", *given, "--json", *arguments]) == status
        return json.loads(capsys.readouterr().out)

    return check


@pytest.mark.long
def test_flops_are_those_of_the_networks(counted, tmp_path):
    """torch's counter gives the same FLOPs, except that fused attention recomputes one of five products."""
    state = build_state(tiny_options(tmp_path, tmp_path / "run"))
    assert counted().flops == pytest.approx(4 * count_flops(state.student, SIZES), rel=0.05)


@pytest.mark.long
def test_a_float32_step_moves_more_and_keeps_more_than_one_in_half_precision(counted):
    full, half, scaled = (counted(64, precision=precision) for precision in ("fp32", "bf16", "fp16"))
    assert full.flops == half.flops == scaled.flops
    assert full.peak_bytes > half.peak_bytes
    assert len(half.found) < len(full.found)  # all crops at once; float32 takes a size after the other
    assert len(half.found) < len(scaled.found)  # the scale of the loss
    assert {operator.half for operator in full.found} == {False}


@pytest.mark.long
def test_every_further_micro_batch_takes_the_same(counted):
    one, two, four = (counted(accumulation=micro_batches) for micro_batches in (1, 2, 4))
    assert four.bytes - two.bytes == 2 * (two.bytes - one.bytes)
    assert four.peak_bytes == two.peak_bytes


@pytest.mark.parametrize(
    ("operator", "tf32", "seconds"),
    [
        (Operator(bytes=10**9, flops=0, half=True), False, 1e9 / (0.8 * 3.35e12)),
        (Operator(bytes=10, flops=10**12, half=True), False, 1e12 / (0.6 * 989e12)),
        (Operator(bytes=10, flops=10**12, half=False), False, 1e12 / (0.6 * 67e12)),
        (Operator(bytes=10, flops=10**12, half=False), True, 1e12 / (0.6 * 494e12)),
        (Operator(bytes=10, flops=10, half=False), False, 2.5e-6),
    ],
    ids=["bytes", "half", "float32", "tf32", "launch"],
)
def test_an_operator_takes_what_limits_it(operator, tf32, seconds):
    assert seconds_on(GPU, [operator], tf32=tf32) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Some GPU", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_a_gpu_is_known_by_the_name_of_its_driver(name, kind):
    assert find_gpu(name) == kind


@pytest.mark.long
def test_a_named_gpu_gets_its_precision_and_needs_no_images(estimated):
    report = estimated("--num_images=4007", "--nproc=2", "--gpu", "h100", "v100")
    h100, v100 = report["gpus"]
    assert (h100["precision"], v100["precision"]) == ("bf16", "fp16")
    assert h100["batch_size"] == 2 and not h100["measured"]
    assert h100["hours"] == pytest.approx(3 * 4004 / (2 * h100["images_per_second"]) / 3600)
    assert h100["cores"] == pytest.approx(2 * h100["images_per_second"] * 0.002)


@pytest.mark.long
def test_micro_batches_are_launched_one_after_the_other(estimated):
    given = ["--data.path=none", "--num_images=4000", "--gpu=h100"]
    one, two, four = (
        estimated(*given, f"--machine.batch_size_per_gpu={size}")["gpus"][0]["host_ms"] for size in (4, 2, 1)
    )
    assert four - two == pytest.approx(2 * (two - one))


@pytest.mark.long
def test_what_a_gpu_does_not_hold_is_a_problem(estimated, monkeypatch):
    monkeypatch.setitem(GPUS, "v100", GPUS["v100"]._replace(memory_gb=0))
    given = ["--data.path=none", "--num_images=4000", "--gpu=v100"]
    (problem,) = estimated(*given, status=1)["problems"]
    assert problem.startswith("v100: 4 images per GPU need")
    assert "use machine.batch_size_per_gpu 2 (the experiment stays the same) or machine.act" in problem


@pytest.mark.long
def test_what_was_measured_stands_beside_it(estimated, monkeypatch, tmp_path):
    write_pictures(tmp_path, 24)
    steps = program.measure_steps
    of_gpu = {"images_per_second": 50.0, "memory_gib": 2.0, "gpu_memory_gib": 79.0}
    monkeypatch.setattr(program, "measure_steps", lambda *a, **k: steps(*a, **k) | of_gpu)
    monkeypatch.setattr(program, "LOADING_SECONDS", 0.05)
    given = [f"--data.path={tmp_path}", "--machine.views=device", "--gpu=a100", "--measure"]
    report = estimated(*given)
    a100, here = report["gpus"]
    assert here["measured"] and here["images_per_second"] == 50.0 and here["memory_bytes"] == 2 * 2**30
    assert here["hours"] == pytest.approx(72 / 50 / 3600)
    assert a100["decode_measured"]
    assert a100["decode_ms"] == pytest.approx(1000 / report["loader"]["images_per_second"])


def test_an_unknown_gpu_is_refused(capsys):
    given = ["--config=demo", "--num_images=10", "--gpu=h1000"]
    assert main(["check", *given]) == 2
    assert "gpu is 'h1000'; expected one or more of b200" in capsys.readouterr().err


def test_an_estimate_without_images_needs_a_gpu_and_measures_nothing(capsys):
    assert main(["check", "--config=demo", "--num_images=10", "--gpu=h100"]) == 2
    assert "num_images is 10, fewer than optim.global_batch_size" in capsys.readouterr().err
    assert main(["check", "--config=demo", "--num_images=10", "--gpu=h100", "--measure"]) == 2
    assert "num_images is 10, which only estimates; leave it out to use measure" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["check", "--config=demo", "--num_images=10"]) == 2
        assert "this machine has no GPU of a known kind; give one or more of b200" in capsys.readouterr().err
