"""A process that loads images and dies or hangs ends the run by naming the file."""

import builtins
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import active_children

import pytest
import torch

from dino_sparo.cli.pretraining import pretrain
from dino_sparo.data import workers
from dino_sparo.data.loader import BatchOrder, CropsDataset, crop_batches
from dino_sparo.data.sources import open_images
from dino_sparo.data.workers import default_workers
from dino_sparo.errors import StuckError, UserError
from dino_sparo.evaluation.features import embed
from dino_sparo.models import build_encoder
from dino_sparo.parallel.processes import memory_free
from tests.pictures import recipes
from tests.tiny import tiny_options, write_pictures

BAD = "005.png"
SAYS = {
    "hang": r"no batch of images came within machine\.data_timeout_seconds 2 while loading .*005\.png",
    "die": r"a process that loads images died .*while loading .*005\.png",
}
BOTH = pytest.mark.parametrize("behavior", SAYS)


@pytest.fixture
def broken_disk(tmp_path, monkeypatch, behavior):
    """Pictures of which one makes whoever opens it hang or die."""
    write_pictures(tmp_path / "data", 12)
    original = builtins.open

    def opening(path, *args, **kwargs):
        if str(path).endswith(BAD):
            time.sleep(600) if behavior == "hang" else os.kill(os.getpid(), signal.SIGKILL)
        return original(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", opening)
    return tmp_path / "data"


@BOTH
def test_training_ends_and_names_the_file(behavior, broken_disk, tmp_path):
    changes = {"machine__num_workers": 2, "machine__data_timeout_seconds": 2}
    started = time.monotonic()
    with pytest.raises(UserError, match=SAYS[behavior]) as caught:
        pretrain(tiny_options(broken_disk, tmp_path / "run", **changes))
    assert time.monotonic() - started < 60
    assert "\n" not in str(caught.value) and str(caught.value).endswith("then run again")


@BOTH
def test_evaluation_ends_and_names_the_file(behavior, broken_disk):
    encoder = build_encoder({"width": 16, "depth": 2, "num_heads": 2}, 8, 16, readout="cls").eval()
    with pytest.raises(UserError, match=SAYS[behavior]):
        embed(encoder, open_images(str(broken_disk)), image_size=16, num_workers=2, timeout_seconds=2)


def batches_of(folder, timeout_seconds=60):
    write_pictures(folder, 12)
    return crop_batches(
        CropsDataset(open_images(str(folder)), recipes(16, 8), 0),
        BatchOrder(num_samples=12, global_batch_size=2, epochs=2, seed=0),
        num_workers=2,
        prefetch_batches=2,
        pin_memory=False,
        timeout_seconds=timeout_seconds,
    )


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="elsewhere no batch needs its maker")
def test_a_worker_that_stops_while_it_hands_over_ends_the_run_in_time(tmp_path):
    loader = batches_of(tmp_path, timeout_seconds=1)
    batches = iter(loader)
    next(batches)
    time.sleep(1)  # both workers have put batches into the queue
    workers = active_children()
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(StuckError, match="no batch of images came within"), loader.failures_explained():
        list(batches)  # first those that had been received before
    assert time.monotonic() - started < 10
    assert not any(worker.is_alive() for worker in workers)  # torch would wait for each of them


def test_loading_leaves_alarm_and_random_numbers_as_they_were(tmp_path):
    alarm, random_state = signal.getsignal(signal.SIGALRM), torch.get_rng_state()
    assert len(list(batches_of(tmp_path))) == 12
    assert signal.getsignal(signal.SIGALRM) is alarm
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_another_thread_loads_without_an_alarm(tmp_path):
    with ThreadPoolExecutor(1) as threads:
        assert len(threads.submit(list, batches_of(tmp_path)).result()) == 12


def test_an_error_ends_the_workers_of_its_loader_at_once_and_no_others(tmp_path):
    good, bad = batches_of(tmp_path / "good"), batches_of(tmp_path / "bad")
    (tmp_path / "bad" / "train" / "class0" / BAD).write_bytes(b"no picture")
    good, of_bad = iter(good), iter(bad)
    next(good)
    before, started = len(active_children()), time.monotonic()
    with pytest.raises(UserError, match=r"005\.png"), bad.failures_explained():
        list(of_bad)
    assert time.monotonic() - started < 5  # which torch would wait for each
    assert 0 < len(active_children()) < before
    next(good)
    good.close()  # which no frame of the error above may keep for the next tests


def test_a_worker_that_cannot_be_killed_does_not_keep_the_program(tmp_path, monkeypatch):
    """As one that waits for a broken disk."""
    monkeypatch.setattr(workers, "KILL_SECONDS", 0.1)
    loader = batches_of(tmp_path)
    batches = iter(loader)
    next(batches)
    stuck = active_children()[0]
    killed = stuck.kill
    monkeypatch.setattr(stuck, "kill", lambda: None)
    with pytest.raises(StuckError, match="too late"), loader.failures_explained():  # which ends at once
        raise UserError("too late")
    assert stuck.is_alive()
    with suppress(RuntimeError):  # of torch, which notices that a worker has died
        killed()
        stuck.join()


def test_other_errors_pass_unchanged(tmp_path):
    loader = batches_of(tmp_path)
    batches = iter(loader)
    next(batches)
    before = len(active_children())
    with pytest.raises(RuntimeError, match="of the network"), loader.failures_explained():
        raise RuntimeError("of the network")
    assert len(active_children()) == before - 2  # although `batches` still refers to them, as in a notebook


def test_workers_are_shared_among_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)), raising=False)
    assert [default_workers(n) for n in (1, 2, 8, 48)] == [16, 12, 3, 1]


def test_views_that_do_not_fit_into_shared_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "shared_memory_free", lambda: 10_000)
    write_pictures(tmp_path / "data", 8)
    options = tiny_options(tmp_path / "data", tmp_path / "run", machine__num_workers=2)
    with pytest.raises(UserError, match=r"need up to 0 MiB of shared memory.*docker run --shm-size"):
        pretrain(options)
    assert not (tmp_path / "run").exists()
    options.machine.num_workers = 0
    pretrain(options)


def test_memory_is_what_the_limits_of_a_job_leave(tmp_path):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/job/step\n")
    step = tmp_path / "cgroups" / "job" / "step"
    step.mkdir(parents=True)
    given = tmp_path / "proc", tmp_path / "cgroups"
    assert memory_free(*given) > 8_000_000 * 1024
    for folder, most in ((step, "max"), (step.parent, "5000000")):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("3000000\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 1000000\n")
    own = memory_free(*given) - 3_000_000
    assert 0 < own < 8_000_000 * 1024
