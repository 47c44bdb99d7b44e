"""What a run shows and leaves behind."""

import contextlib
import io
import math
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dino_sparo.cli.pretraining import pretrain
from dino_sparo.data.loader import BatchOrder
from dino_sparo.errors import UserError
from dino_sparo.files import read_lines
from dino_sparo.runs import checkpoint
from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.runs.rundir import read_starts
from dino_sparo.runs.runlog import RunLog, read_metrics
from dino_sparo.training import periodic
from dino_sparo.training import pretrain as program
from dino_sparo.training.loss import DINOLoss
from dino_sparo.training.setup import build_schedules
from dino_sparo.training.stopping import BadSteps
from tests.pictures import photo
from tests.tiny import build_state, one_step, state_hash, tiny_options, write_pictures

GROUPS = {
    "loss": {"loss", "kl"},
    "networks": {
        *("entropy_teacher", "entropy_mean", "feature_std", "center_norm", "gradient_norm"),
        "gradient_norm_max",
    },
    "knn": {"knn20_top1", "knn20_top5"},
    "slots": {
        *("slot_entropy", "slot_cls_share", "slot_effective_patches", "slots_dead", "slots_duplicate"),
        "slot_agreement",
    },
    "schedule": {"lr", "weight_decay", "momentum", "teacher_temp", "student_temp"},
    "machine": {
        *("seconds", "images_per_second", "data_wait_share", "log_share", "memory_gib", "loss_scale"),
        *("overflows", "bad_steps", "bad_images"),
    },
}
OF_SLOTS = GROUPS["slots"]  # at the end of an epoch
SCALARS = set().union(*(GROUPS[group] for group in ("loss", "networks", "schedule", "machine")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    write_pictures(folder / "data", 60, classes=3)
    changes = {"monitor__knn_every_epochs": 2, "optim__global_batch_size": 30}
    pretrain(tiny_options(folder / "data", folder / "run", **changes))
    return folder / "run"


def test_tensorboard_has_every_scalar_by_group_the_first_crops_and_maps_of_slots(finished):
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert tags["tensors"] == ["recipe/text_summary"]
    (recipe,) = events.Tensors("recipe/text_summary")
    assert b"global_batch_size: 30\n" in recipe.tensor_proto.string_val[0]
    grouped = {f"{group}/{name}" for group, names in GROUPS.items() for name in names}
    grouped.add("machine/knn20_images")
    assert set(tags["scalars"]) == grouped
    assert [event.step for event in events.Scalars("loss/loss")] == [1, 2, 3, 4, 5, 6]
    assert sorted(tags["images"]) == ["slots/maps", "views/first_crops"]
    maps = events.Images("slots/maps")
    assert [event.step for event in maps] == [0, 4, 6]
    assert (maps[0].width, maps[0].height) == (4 * 224 + 3 * 3, 4 * 224)  # image, CLS, two slots
    picture = events.Images("views/first_crops")[0]
    assert (picture.width, picture.height) == (2 + 4 * (16 + 2), 2 + 4 * (16 + 2))  # four images, four crops


def test_photographs_of_different_sizes_are_drawn_too(tmp_path):
    """Pictures of slots are larger for larger images."""
    for number, size in enumerate([(400, 300), (375, 500), (640, 480), (240, 320)] * 7):
        file = tmp_path / "data" / ("val" if number < 4 else "train") / f"class{number % 2}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo(*size).save(file)
    run = tmp_path / "run"
    changes = {"optim__epochs": 1, "optim__global_batch_size": 8, "monitor__knn_every_epochs": 1}
    pretrain(tiny_options(tmp_path / "data", run, **changes))
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("slots/maps")] == [0, 3]
    assert {image.height for image in events.Images("slots/maps")} == {4 * 328}  # the smallest of the four


def test_metrics_file_has_the_same(finished):
    entries = read_metrics(finished)
    curve = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in curve] == [1, 2, 3, 4, 5, 6]
    assert curve[2]["epoch"] == 1.5
    for entry in curve:
        assert entry["kl"] == pytest.approx(entry["loss"] - entry["entropy_teacher"], abs=1e-6)
        assert entry["gradient_norm"] >= entry["gradient_norm_max"] > 0
    for entry in curve:
        expected = SCALARS | {"step", "epoch"} | (set() if entry["step"] % 2 else OF_SLOTS)
        assert entry.keys() == expected
    assert [(e["step"], e["epoch"]) for e in entries if "knn20_top1" in e] == [(0, 0), (4, 2), (6, 3)]


def test_the_curve_is_about_the_center_that_the_loss_used(tmp_path):
    state = build_state(tiny_options(tmp_path, tmp_path / "run"))
    before = state.loss_fn.center.normal_().clone()
    output = one_step(state, [torch.randn(2, 3, 3, 16, 16)])
    assert torch.equal(output.center, before)
    assert not torch.equal(state.loss_fn.center, before)


def test_logged_schedules_are_those_of_the_step(finished):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    options = tiny_options("x", "y", optim__global_batch_size=30)
    assert config["optim"] == vars(options.optim)
    schedules = build_schedules(options.optim, options.loss, steps_per_epoch=2)
    for entry in read_metrics(finished):
        if "loss" in entry:
            expected = schedules.at(entry["step"] - 1)
            for name in ("lr", "weight_decay", "momentum", "teacher_temp"):
                assert entry[name] == getattr(expected, name), name
            assert entry["student_temp"] == 0.1


def test_k_nn_is_of_the_teacher(tmp_path, monkeypatch):
    seen = []

    def evaluate(encoder, *_, **__):
        seen.append({name: value.clone() for name, value in encoder.state_dict().items()})
        return {"knn20_top1": 0.0, "knn20_top5": 0.0, "knn20_images": 9}

    monkeypatch.setattr(periodic, "evaluate_teacher", evaluate)
    write_pictures(tmp_path / "data", 60, classes=3)
    pretrain(tiny_options(tmp_path / "data", tmp_path / "run", monitor__knn_every_epochs=1))
    state = load_latest(tmp_path / "run")
    assert len(seen) == 4
    assert all(torch.equal(state["teacher"][f"encoder.{name}"], value) for name, value in seen[-1].items())
    assert any(not torch.equal(state["student"][f"encoder.{name}"], v) for name, v in seen[-1].items())


def test_speed_and_waiting_share_leave_evaluation_out(tmp_path):
    with RunLog(tmp_path, first_step=0, steps_per_epoch=4, total_steps=8) as run_log:
        with run_log.not_training():
            time.sleep(1)
        with run_log.waiting_for_data():
            time.sleep(0.2)
        time.sleep(0.2)
        run_log.scalars(4, {"loss": 1.0, **run_log.speed(4, batch_size=10)})
    (entry,) = read_metrics(tmp_path)
    # 40 images in 0.4 s, half of them waiting; a busy machine makes it slower, never twice as fast
    assert 40 < entry["images_per_second"] <= 100
    assert 0.2 < entry["data_wait_share"] < 0.8


class Event:
    """Of a GPU that comes to it when it has been asked so often."""

    def __init__(self, asked: int) -> None:
        self.asked = asked

    def query(self) -> bool:
        self.asked -= 1
        return self.asked <= 0


@pytest.mark.parametrize("what", ["next entry", "evaluation", "flush"])
def test_an_entry_whose_numbers_come_late_is_written_before_anything_else(what, tmp_path):
    with RunLog(tmp_path, first_step=0, steps_per_epoch=4, total_steps=8) as run_log:

        def entry(step):
            values = {"loss": 1.0, **run_log.speed(step, batch_size=10)}
            return lambda: run_log.scalars(step, values)

        run_log.postpone(entry(1), Event(asked=4))
        run_log.step_done(1)
        run_log.step_done(2)
        assert read_metrics(tmp_path) == []
        if what == "next entry":
            run_log.postpone(entry(2), Event(asked=1))
            assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]
            run_log.step_done(3)
        elif what == "evaluation":
            run_log.evaluation(2, {"knn20_top1": 0.0}, "20-NN")
        else:
            run_log.flush()
        steps = [entry["step"] for entry in read_metrics(tmp_path)]
    assert steps == [1] if what == "flush" else steps == [1, 2]


def test_an_entry_that_is_there_is_not_lost_when_a_run_ends_by_an_error(tmp_path):
    with (
        suppress(ZeroDivisionError),
        RunLog(tmp_path, first_step=0, steps_per_epoch=4, total_steps=8) as run_log,
    ):
        values = {"loss": 1.0, **run_log.speed(1, batch_size=10)}
        run_log.postpone(lambda: run_log.scalars(1, values), Event(asked=1))
        1 / 0  # noqa: B018
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with RunLog(tmp_path, first_step=0, steps_per_epoch=2, total_steps=4) as run_log:
        for step in (1, 2, 3):
            time.sleep(0.15)  # the bar redraws every 0.1 s
            run_log.step_done(step)
            run_log.scalars(step, {"loss": 1.25, **run_log.speed(step, batch_size=10)})
    shown = terminal.getvalue()
    for words in ("epoch 1/2", "epoch 2/2", "loss=1.250", "img/s=", "run left=0:00:0", "<00:00"):
        assert words in shown, words
    kept = [line.split("\r")[-1] for line in shown.split("\n")]
    assert kept[0].startswith("epoch 1/2: 100%") and kept[1].startswith("epoch 2/2:  50%")


@contextlib.contextmanager
def wrong(what: str, *wrong_steps: int):
    """Within, the loss of some steps is NaN, or only its gradients."""
    original, steps = DINOLoss.forward, []

    def forward(self, student, *rest):
        steps.append(1)
        if len(steps) not in wrong_steps:
            return original(self, student, *rest)
        if what == "loss":
            return original(self, student, *rest) * math.nan
        return original(self, student * 1, *rest) + (student - student.detach()).sum() * 1e38 * 1e38

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DINOLoss, "forward", forward)
        yield


@pytest.fixture
def eight(tmp_path):
    write_pictures(tmp_path / "data", 8)  # two steps an epoch, three epochs
    return lambda name, **changes: tiny_options(tmp_path / "data", tmp_path / name, **changes)


@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_a_step_whose_numbers_go_wrong_ends_the_run_and_the_state_before_it_is_kept(
    what, eight, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "KEEP_LAST", 100)
    pretrain(eight("whole", log__checkpoint_every_minutes=1e-9))
    options, message = eight("run"), f"step 4: {what} not finite; .*bad_steps.jsonl"
    with wrong(what, 4), pytest.raises(UserError, match=message):
        pretrain(options)
    kept, expected = load_latest(tmp_path / "run"), tmp_path / "whole" / "checkpoints" / "step_000000003.pt"
    assert state_hash(kept) == state_hash(torch.load(expected))
    (noted,) = read_lines(tmp_path / "run" / "bad_steps.jsonl")
    assert (noted["step"], noted["cause"]) == (4, what)
    order = BatchOrder(num_samples=8, global_batch_size=4, epochs=3, seed=options.seed, first_step=3)
    assert noted["samples"] == [number for _, number in next(iter(order))]
    assert [Path(name).name for name in noted["images"]] == [f"{n:03d}.png" for n in noted["samples"]]
    pretrain(options)  # the cause is gone
    assert state_hash(load_latest(tmp_path / "run")) == state_hash(load_latest(tmp_path / "whole"))


def test_some_bad_steps_may_be_skipped(eight, tmp_path, caplog):
    options = eight("run", optim__max_bad_steps=2, optim__epochs=4)
    message = r"step 6: loss not finite.*max_bad_steps 3 to skip such"
    with wrong("loss", 3, 4, 6), pytest.raises(UserError, match=message):
        pretrain(options)
    assert caplog.text.count("it is skipped") == 2
    assert load_latest(tmp_path / "run")["step"] == 5
    pretrain(eight("run", optim__max_bad_steps=3, optim__epochs=4))  # it may change in a run
    entries = read_metrics(tmp_path / "run")
    assert [entry["bad_steps"] for entry in entries] == [0, 0, 1, 2, 2, 0, 0, 0]
    assert math.isnan(entries[2]["loss"]) and math.isfinite(entries[4]["loss"])


def test_a_bad_step_that_comes_again_at_each_start_can_be_skipped(eight, tmp_path, monkeypatch):
    """A resume is bit for bit, and so is the step that ended the run."""
    original = DINOLoss.forward

    def forward(self, *given):
        fourth = torch.initial_seed() == program.step_seed(eight("run").seed, 3, rank=0)
        return original(self, *given) * (math.nan if fourth else 1)

    monkeypatch.setattr(DINOLoss, "forward", forward)
    pretrain(eight("uninterrupted", optim__max_bad_steps=1))
    for _ in range(2):
        with pytest.raises(UserError, match=r"step 4: loss not finite.*max_bad_steps 1 to skip such"):
            pretrain(eight("run", log__log_every_steps=2))
        assert load_latest(tmp_path / "run")["step"] == 3
    pretrain(eight("run", optim__max_bad_steps=1))
    assert state_hash(load_latest(tmp_path / "run")) == state_hash(load_latest(tmp_path / "uninterrupted"))
    noted = read_lines(tmp_path / "run" / "bad_steps.jsonl")
    assert [(entry["step"], entry["cause"]) for entry in noted] == [(4, "loss")] * 3


def test_bad_steps_are_read_in_order_and_once():
    bad_steps = BadSteps(torch.device("cpu"), allowed=10_000)
    yes, no = torch.tensor(True), torch.tensor(False)
    assert bad_steps.new(0) == []
    for bad, finite_loss in ((no, yes), (yes, no), (yes, yes)):
        bad_steps.add(bad, finite_loss)
    assert bad_steps.new(40) == [(1, 42, "loss"), (2, 43, "gradients")]
    assert bad_steps.new(40) == []
    for _ in range(1001):
        bad_steps.add(yes, no)
    found = bad_steps.new(40)
    assert len(found) == 1000 and found[0] == (4, 45, "loss") and found[-1] == (1003, 1044, "loss")


def test_state_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    write_pictures(tmp_path / "data", 8)
    original = program.train_step

    def poisoned(state, *args, **kwargs):
        output = original(state, *args, **kwargs)
        with torch.no_grad():
            next(state.student.parameters()).fill_(math.nan)
        return output

    monkeypatch.setattr(program, "train_step", poisoned)
    with pytest.raises(UserError, match="a parameter is no longer finite at step 1: the run has diverged"):
        pretrain(tiny_options(tmp_path / "data", tmp_path / "run"))
    assert load_latest(tmp_path / "run") is None


def test_teacher_has_no_stochastic_depth_and_no_gradient(tmp_path):
    state = build_state(tiny_options(tmp_path, tmp_path / "run"))
    student_drops = [m for m in state.student.modules() if type(m).__name__ == "DropPath"]
    assert student_drops
    assert not [m for m in state.teacher.modules() if type(m).__name__ == "DropPath"]
    assert not any(parameter.requires_grad for parameter in state.teacher.parameters())
    for name, value in state.teacher.state_dict().items():
        assert torch.equal(value, state.student.state_dict()[name]), name


def test_starts_are_recorded(finished):
    (start,) = read_starts(finished)
    assert start["versions"]["torch"] == torch.__version__.split("+")[0]
    assert isinstance(start["command"], list)
    assert (start["processes"], start["device"], start["precision"]) == (1, "cpu", "fp32")
    assert (start["batch_size_per_gpu"], start["accumulation"]) == (30, 1)
