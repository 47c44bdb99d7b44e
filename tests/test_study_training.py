"""`dino-sparo study --evaluate false`: the plan, the table, and resuming after a stop."""

import json
import os
import re
import shutil
import signal
import statistics

import pytest
import yaml

from dino_sparo import load_encoder
from dino_sparo.__main__ import main
from dino_sparo.cli.pretraining import StudyOptions, planned, study
from dino_sparo.errors import StoppedError, UserError
from dino_sparo.models import build_encoder
from dino_sparo.models.cost import count_parameters, encoder_cost
from dino_sparo.parallel.processes import STOP_SIGNALS
from dino_sparo.recipe.files import recipes
from dino_sparo.runs.runlog import RunLog, read_metrics
from dino_sparo.study.variants import parse_vary
from tests.tiny import parse_options, tiny_arguments

CHANGES = {"monitor__knn_every_epochs": 2, "optim__epochs": 2, "model__readout__slot_dim": 8}


def arguments(data, *more: str, **changes) -> list[str]:
    folder = data.parent / "study"
    return [*tiny_arguments(data, folder, **(CHANGES | changes)), "--evaluate=false", *more]


def options(data, *more: str, vary=(), **changes) -> StudyOptions:
    given = [*arguments(data, *more, **changes), f"--vary={json.dumps(list(vary))}"]
    return parse_options(StudyOptions, given, usage="")


def starts(folder) -> dict[str, int]:
    paths = sorted(folder.glob("*/starts.jsonl"))
    return {path.parent.name: len(path.read_text().splitlines()) for path in paths}


def rows_of(folder) -> list[dict]:
    return json.loads((folder / "runs.json").read_text())["rows"]


# --- What is planned


def test_all_combinations_in_their_order(data):
    runs = planned(options(data, vary=["model.readout.num_slots=2,4", "seed=0,1"]))
    assert [(v.folder, v.row) for v in runs] == [
        (f"num_slots={slots}_seed={seed}", f"num_slots={slots}") for slots in (2, 4) for seed in (0, 1)
    ]
    last = runs[-1].recipe
    assert (last.model.readout.num_slots, last.seed) == (4, 1)
    assert runs[-1].run_dir == data.parent / "study" / "num_slots=4_seed=1"
    assert (last.optim.epochs, last.data.path) == (2, str(data))  # of the recipe
    assert not (data.parent / "study").exists()


def test_the_recipe_alone_and_keys_with_one_last_part(data):
    (alone,) = planned(options(data))
    assert (alone.folder, alone.row, alone.changes) == ("recipe", "recipe", {})
    runs = planned(options(data, vary=["data.path=a", "monitor.knn_path=b,null"]))
    assert [v.folder for v in runs] == ["path=a_knn_path=b", "path=a_knn_path=null"]
    both = ["views.local_size=8", "model.readout.name=sparo", "optim.warmup_epochs=0,1"]
    assert planned(options(data, vary=both))[1].folder == "local_size=8_name=sparo_warmup_epochs=1"


def test_an_architecture_is_varied_as_a_section(data):
    runs = planned(options(data, vary=["model.arch={width: 64, depth: 3, num_heads: 2},vit_tiny"]))
    assert [run.recipe.model.arch for run in runs][1] == "vit_tiny" and runs[0].recipe.model.arch.depth == 3


def test_values_of_a_key():
    scales = ["[0.1, 0.4]", "[0.2,0.5]"]
    assert parse_vary("seed=0, 1") == ("seed", ["0", "1"])
    assert parse_vary("views.local_scale=[0.1, 0.4],[0.2,0.5]") == ("views.local_scale", scales)
    assert parse_vary("model.arch={width: 64, depth: 3},vit_tiny")[1] == ["{width: 64, depth: 3}", "vit_tiny"]
    assert parse_vary("a=[{x: 1, y: [2, 3]}],4")[1] == ["[{x: 1, y: [2, 3]}]", "4"]
    for text in ("seed", "seed=", "=3", "seed=1,,2"):
        with pytest.raises(UserError, match=r"vary has '.*'; expected section.key=VALUE,VALUE"):
            parse_vary(text)


def test_every_variant_is_looked_at_before_one_is_trained(data, tmp_path):
    (tmp_path / "mine.yaml").write_text("good: {}\nlate: {monitor.knn_every_epochs: 0}\n")
    with pytest.raises(UserError, match=r"monitor\.knn_every_epochs is 0"):
        study(options(data, f"--variants={tmp_path / 'mine.yaml'}"))
    assert not list((data.parent / "study").glob("*/checkpoints"))


WITHOUT_SLOTS = {name for name in recipes() if "dino" in name} | {"continue_vits16"}


@pytest.mark.long
@pytest.mark.parametrize("recipe", [name for name in recipes() if name not in WITHOUT_SLOTS])
def test_shipped_variants_fit_every_sparo_recipe(tmp_path, recipe):
    given = ["--config", recipe, "--data.path=x", f"--run_dir={tmp_path}", "--variants=readouts"]
    runs = planned(parse_options(StudyOptions, given, usage=""))
    shipped = yaml.safe_load((recipes()["demo"].parent / "variants" / "readouts.yaml").read_text())
    assert [variant.row for variant in runs] == list(shipped)
    names = {variant.recipe.model.readout.name for variant in runs}
    assert names == {"sparo", "pooler", "bottleneck", "gap", "cls"}
    for variant in runs:
        if "imagenet" not in recipe:
            assert build_encoder(**variant.recipe.encoder_arguments()).embed_dim > 0
    assert len({json.dumps(variant.recipe.as_dict()["model"]) for variant in runs}) == len(runs)


def test_variants_of_a_file_and_some_of_them(data, tmp_path):
    (tmp_path / "mine.yaml").write_text("few: {model.readout.num_slots: 2}\nlong: {optim.epochs: 5}\n")
    given = f"--variants={tmp_path / 'mine.yaml'}"
    assert [v.folder for v in planned(options(data, given, vary=["seed=3"]))] == ["few_seed=3", "long_seed=3"]
    runs = planned(options(data, given, '--only=["long"]'))  # the table has all
    (long,) = (variant for variant in runs if variant.name == "long")
    assert len(runs) > 1
    assert (long.row, long.recipe.optim.epochs, long.changes) == ("long", 5, {"optim.epochs": 5})


@pytest.mark.parametrize(
    ("more", "vary", "message"),
    [
        ([], ["model.readout.slots=2"], "variant 'slots=2': key 'model.readout.slots' is unknown; did you"),
        ([], ["seed=0,x"], "variant 'seed=x': seed is x; expected a whole number"),
        ([], ["model.readout.group_size=3"], "'group_size=3': model.readout.group_size is 3, which does"),
        ([], ["seed=0", "seed=1"], "vary is .*seed=1.*, with a key twice"),
        ([], ["seed=0,0"], "run 'seed=0' is planned twice"),
        (["--variants=nope"], [], "variants 'nope' does not exist; give a YAML file or one of .*: readouts"),
        (['--only=["cls"]'], [], "only is .'cls'., but there is no file of variants"),
        (["--variants=readouts", '--only=["clz"]'], [], "only has 'clz'; expected variants of .*: sparo, "),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(data, more, vary, message):
    with pytest.raises(UserError, match=message):
        study(options(data, *more, vary=vary))
    assert not (data.parent / "study").exists()


@pytest.mark.parametrize("content", ["- a\n", "a: 3\n", "a: [", ""])
def test_a_file_that_holds_no_variants(data, tmp_path, content):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(UserError, match=r"mine.yaml is (not a file of variants|not valid YAML)"):
        planned(options(data, f"--variants={tmp_path / 'mine.yaml'}"))


def test_images_without_labels(data):
    shutil.rmtree(data / "val")
    (data / "train" / "class1").rename(data / "train" / "class0" / "inner")
    with pytest.raises(UserError, match=r"has no labels or too few images for k-NN, .* monitor.knn_path"):
        study(options(data))


# --- What the table says


@pytest.mark.long
def test_one_command_fills_the_table_and_the_same_command_trains_nothing_more(data, capsys):
    command = ["study", *arguments(data), "--vary", "model.readout.num_slots=2,4", "--vary", "seed=0,1"]
    assert main(command) == 0
    folder = data.parent / "study"
    rows = rows_of(folder)
    assert [row["variant"] for row in rows] == ["num_slots=2", "num_slots=4"]
    for row in rows:
        encoder = load_encoder(folder / row["runs"][0]["run"])
        assert row["parameters"] == count_parameters(encoder)
        assert row["readout_parameters"] == count_parameters(encoder.readout)
        assert row["flops"] == encoder_cost(encoder, 16)["flops"]
        final = [read_metrics(folder / run["run"])[-1] for run in row["runs"]]
        assert [entry["epoch"] for entry in final] == [2, 2]
        assert [run["knn20_top1"] for run in row["runs"]] == [entry["knn20_top1"] for entry in final]
        assert row["knn20_top1"] == pytest.approx(sum(entry["knn20_top1"] for entry in final) / 2)
        assert row["sd"] == pytest.approx(statistics.stdev(entry["knn20_top1"] for entry in final))
    few, many = rows
    assert many["readout_parameters"] - few["readout_parameters"] == 2 * (4 + 4 * 17)  # two queries and keys
    printed = capsys.readouterr().out
    written = (folder / "runs.md").read_text().replace("|", " ")
    assert all(" ".join(line.split()) in " ".join(written.split()) for line in printed.splitlines()[2:4])
    assert f" {few['knn20_top1']:.2f} ± {few['sd']:.2f} 2 of 2\n" in re.sub(" +", " ", printed)
    assert main(command) == 0
    assert list(starts(folder).values()) == [1, 1, 1, 1] and capsys.readouterr().out == printed


@pytest.mark.long
def test_a_run_that_fails_fills_its_row_and_the_next_one_starts(data, capsys):
    assert main(["study", *arguments(data), "--vary", "optim.global_batch_size=4,4096,8"]) == 1
    rows = rows_of(data.parent / "study")
    assert [row["knn20_top1"] is None for row in rows] == [False, True, False]
    assert "fewer than one batch" in rows[1]["runs"][0]["error"]
    assert " - 0 of 1, 1 failed\n" in re.sub(" +", " ", capsys.readouterr().out)


def test_another_experiment_in_the_same_folder_is_refused(data):
    study(options(data))
    before = (data.parent / "study" / "runs.json").read_text()
    with pytest.raises(UserError, match=r"another experiment \(optim.final_lr was"):
        study(options(data, optim__final_lr=0.5))
    assert (data.parent / "study" / "runs.json").read_text() == before


@pytest.mark.long
def test_a_signal_stops_all_and_the_same_command_goes_on(data, monkeypatch):
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    scalars, logged = RunLog.scalars, []

    def stop_in_the_second_run(self, step, values):
        scalars(self, step, values)
        logged.append(step)
        if len(logged) == 12 + 3:
            os.kill(os.getpid(), signal.SIGTERM)

    folder, given = data.parent / "study", options(data, vary=["seed=0,1,2"])
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "scalars", stop_in_the_second_run)
        try:
            with pytest.raises(StoppedError, match="stopped by SIGTERM after step 3 of 12"):
                study(given)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    (row,) = rows_of(folder)
    assert [run["knn20_top1"] is None for run in row["runs"]] == [False, True, True]
    assert not (folder / "seed=2").exists()
    assert study(given) == 0
    (row,) = rows_of(folder)
    assert None not in [run["knn20_top1"] for run in row["runs"]]
    assert starts(folder) == {"seed=0": 1, "seed=1": 2, "seed=2": 1}
