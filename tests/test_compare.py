"""The table of several runs from their recipes and results.json."""

import re
from pathlib import Path

import numpy as np
import pytest

from dino_sparo.__main__ import main
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.evaluation.compare import compare_runs, paired_bootstrap, t_interval
from dino_sparo.evaluation.results import Result, read_results, save_results
from tests.test_results import result as made_result

CONFIG = """
seed: {seed}
data: {{path: {path}, max_images: null}}
model: {{arch: vit_small, readout: {{name: {readout}, num_slots: {num_slots}}}}}
optim: {{epochs: {epochs}}}
monitor: {{knn_every_epochs: {seed}}}
machine: {{num_workers: {seed}}}
log: {{log_every_steps: {seed}}}
"""
NUM_IMAGES = 200


def result(num_right: int, **changes: object) -> Result:
    """A result with the first `count` of 200 images right."""
    total = int(changes.get("num_images", NUM_IMAGES))
    return made_result((np.arange(total) < num_right).tolist(), **({"details": {}} | changes))


def make_run(folder: Path, *results: Result, recipe: bool = True, **changes: object) -> str:
    save_results(folder, results)
    given = {"seed": 0, "path": "/data", "readout": "sparo", "num_slots": 64, "epochs": 100} | changes
    if recipe:
        (folder / "config.yaml").write_text(CONFIG.format(**given))
    return str(folder)


@pytest.fixture
def three_and_one(tmp_path) -> list[str]:
    """Three seeds of SPARO with 70, 71 and 75 % and one of the baseline with 68 %."""
    runs = [
        make_run(tmp_path / f"s{seed}", result(right), seed=seed, path=f"/data{seed}")
        for seed, right in enumerate((140, 142, 150))
    ]
    return [*runs, make_run(tmp_path / "d0", result(136), readout="cls")]


# --- The table


def test_values_that_mean_the_same_as_null_do_not_part_runs(tmp_path):
    runs = [make_run(tmp_path / f"s{seed}", result(100), seed=seed) for seed in (0, 1)]
    config = tmp_path / "s0" / "config.yaml"
    written = config.read_text().replace("num_slots:", "after_last_block: false, heads: separate, num_slots:")
    assert written != config.read_text()
    config.write_text(written)
    assert compare_runs(runs).rows[0][1].endswith("(2 seeds)")
    runs = [make_run(tmp_path / f"e{epochs}", result(100), epochs=epochs) for epochs in (0, 7)]
    assert compare_runs(runs).header[1:] == ["sparo epochs 0", "sparo epochs 7"]  # 0 is not null


def test_other_seeds_are_told_row_by_row(three_and_one, tmp_path):
    linear = result(120, protocol="linear", name="linear")
    for folder in ("s0", "s2", "d0"):
        save_results(tmp_path / folder, [linear])
    found = compare_runs(three_and_one)
    assert "different seeds in 20-NN, val: sparo has 0, 1, 2, cls has 0" in found.notes
    assert "different seeds in linear, val: sparo has 0, 2, cls has 0" in found.notes


def test_seeds_of_a_recipe_are_one_column(three_and_one, tmp_path):
    found = compare_runs(three_and_one)
    assert found.header == ["top-1 in %", "sparo", "cls (control)"]
    deviation = np.std([70, 71, 75], ddof=1)
    ours = [np.arange(NUM_IMAGES) < right for right in (140, 142, 150)]
    low, high = paired_bootstrap(ours, [np.arange(NUM_IMAGES) < 136])
    assert found.rows == [
        ["20-NN, val, 200 images", f"72.00 ± {deviation:.2f} (3 seeds)", "68.00 ± 3.30 (1 seed)"],
        ["  difference to cls", f"+4.00 [{low:+.2f}, {high:+.2f}]", ""],
    ]
    assert any("s0 (seed 0)" in note and "s2 (seed 2)" in note for note in found.notes)
    assert "different seeds: sparo has 0, 1, 2, cls has 0" in found.notes
    others = [make_run(tmp_path / f"d{seed}", result(130), readout="cls", seed=seed) for seed in (1, 2)]
    found = compare_runs([*three_and_one, *others])
    assert not any("seeds: " in note for note in found.notes)
    accuracies = (
        [result.top1 for run in group for result in read_results(Path(run))]
        for group in (three_and_one[:3], [three_and_one[3], *others])
    )
    low, high = t_interval([ours - theirs for ours, theirs in zip(*accuracies, strict=True)])
    assert found.rows[2] == [
        "  over seeds",
        f"{(low + high) / 2:+.2f} [{low:+.2f}, {high:+.2f}] (3 pairs)",
        "",
    ]
    assert (
        "the interval over seeds is a 95 % t-interval of the differences between runs with equal seeds"
        in found.notes
    )


def test_notes_are_of_what_is_shown(three_and_one):
    of_one = f"sparo: {Path(three_and_one[0]).parent}/s0 (seed 0)"
    of_each = "one run: ± one standard error, from its number of test images"
    assert compare_runs(three_and_one[:1]).notes == [of_one, of_each]
    assert compare_runs(three_and_one[:3]).notes[1:] == [
        "sparo: the seeds were trained on /data0 and /data1 and /data2",
        "mean ± sample standard deviation over seeds",
    ]
    of_both = compare_runs([three_and_one[0], three_and_one[3]]).notes
    assert of_both[0] == of_one and len(of_both) == 4 and "95 % interval by a paired bootstrap" in of_both[3]


def test_the_control_can_be_chosen(three_and_one):
    found = compare_runs(three_and_one, control=three_and_one[1])
    assert found.header == ["top-1 in %", "sparo (control)", "cls"]
    assert found.rows[1][2].startswith("-4.00 [-")


@pytest.mark.parametrize("same", ["sparo", "cls"])
def test_no_single_other_readout_and_no_differences(tmp_path, same):
    """Recipes with the same read-out are labeled by the fields that differ."""
    runs = [
        make_run(tmp_path / "a", result(100), readout=same),
        make_run(tmp_path / "b", result(120), readout=same, epochs=300),
    ]
    found = compare_runs(runs)
    assert found.header == ["top-1 in %", f"{same} epochs 100", f"{same} epochs 300"]
    assert len(found.rows) == 1
    assert any("no differences" in note and "--control RUN" in note for note in found.notes)
    assert compare_runs(runs, control=runs[0]).rows[1][2].startswith("+10.00 [")


def test_untrained_student_and_few_shot_are_rows_of_their_own(tmp_path):
    results = [
        result(80, test_set="sketch"),
        result(100),
        result(20, weights="untrained"),
        result(90, weights="student"),
        result(110, protocol="linear", name="4 blocks both lr 0.001", details={"train_fraction": 0.1}),
        result(120, protocol="linear", name="4 blocks both lr 0.001"),
        result(199, name="10-NN", headline=False),
    ]
    found = compare_runs([make_run(tmp_path / "a", *results)])
    assert found.rows == [
        ["20-NN, val, 200 images", "50.00 ± 3.54 (1 seed)"],
        ["20-NN, sketch, 200 images", "40.00 ± 3.46 (1 seed)"],
        ["20-NN, val, student, 200 images", "45.00 ± 3.52 (1 seed)"],
        ["20-NN, val, untrained, 200 images", "10.00 ± 2.12 (1 seed)"],
        ["linear, val, 200 images", "60.00 ± 3.46 (1 seed)"],
        ["linear, val, 10 % of train, 200 images", "55.00 ± 3.52 (1 seed)"],
    ]


def test_the_official_probes_share_a_row_and_what_only_one_has_leaves_a_gap(tmp_path):
    linear = {"protocol": "linear", "num_images": NUM_IMAGES}
    ours = [result(120, name="4 blocks both lr 0.001", **linear), result(60, test_set="sketch")]
    theirs = result(100, name="4 blocks cls lr 0.001", **linear)
    runs = [make_run(tmp_path / "a", *ours), make_run(tmp_path / "b", theirs, readout="cls")]
    rows = compare_runs(runs).rows
    assert rows[0] == ["20-NN, sketch, 200 images", "30.00 ± 3.24 (1 seed)", "–"]
    assert rows[1] == ["linear, val, 200 images", "60.00 ± 3.46 (1 seed)", "50.00 ± 3.54 (1 seed)"]
    assert rows[2][1].startswith("+10.00 [")


def test_the_newest_headline_result_counts(tmp_path):
    run = make_run(tmp_path / "a", result(100, protocol="linear", name="lr 0.1"))
    for right, name in ((120, "lr 0.2"), (110, "lr 0.1")):
        save_results(Path(run), [result(right, protocol="linear", name=name)])
    assert compare_runs([run]).rows[0] == ["linear, val, 200 images", "55.00 ± 3.52 (1 seed)"]


@pytest.mark.parametrize("changes", [{"images": "other"}, {"num_images": 100}], ids=["order", "number"])
def test_other_test_images_have_no_interval_and_it_says_why(tmp_path, changes):
    ours = make_run(tmp_path / "a", result(80, **changes))
    found = compare_runs([ours, make_run(tmp_path / "b", result(60), readout="cls")])
    assert "[" not in found.rows[1][1] and found.rows[1][1].startswith("+")
    assert any("no interval for sparo" in note and "same test images" in note for note in found.notes)


def test_accuracies_that_were_not_measured_alike_are_noted(tmp_path):
    linear = {"protocol": "linear", "name": "probe"}
    ours = make_run(tmp_path / "a", result(120, details={"epochs": 100}, **linear))
    theirs = make_run(tmp_path / "b", result(110, details={"epochs": 10}, **linear), readout="cls")
    assert any(
        note == "linear, val: measured with different settings (epochs 100 and 10)"
        for note in compare_runs([ours, theirs]).notes
    )


def test_folders_without_a_recipe_stand_alone(tmp_path):
    runs = [make_run(tmp_path / str(i) / "dino", result(100 + i), recipe=False) for i in (0, 2)]
    found = compare_runs([*runs, make_run(tmp_path / "vits16_evaluation", result(120), recipe=False)])
    names = [f"dino, {tmp_path / str(i) / 'dino'}" for i in (0, 2)]
    assert found.header == ["top-1 in %", *names, "vits16_evaluation"]
    assert found.rows[0][1:] == ["50.00 ± 3.54", "51.00 ± 3.53", "60.00 ± 3.46"]  # without a seed
    assert any("of weights without a recipe is not known" in note for note in found.notes)


def test_weights_that_are_gone_and_columns_of_one_name(tmp_path):
    make_run(tmp_path / "vits16_evaluation", result(120), recipe=False)
    assert compare_runs([str(tmp_path / "vits16.pth")]).header[1] == "vits16.pth"
    runs = [make_run(tmp_path / "a", result(100)), make_run(tmp_path / "sparo", result(90), recipe=False)]
    assert compare_runs(runs).header[1:] == [f"sparo, {runs[0]}", f"sparo, {runs[1]}"]


def test_columns_are_aligned_and_markdown_has_as_many_cells_in_every_line(three_and_one, capsys):
    assert main(["compare", *three_and_one, "--control", three_and_one[3]]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = {lines[0].index("cls (control)"), lines[2].index("68.00")}
    assert len(starts) == 1 and lines[0].index("sparo") == lines[3].index("+4.00")
    assert main(["compare", "--markdown", *three_and_one]) == 0
    marked = re.sub(" +", " ", capsys.readouterr().out).splitlines()
    assert [line.count("|") for line in marked[:4]] == [4, 4, 4, 4] and set(marked[1]) == set("| -")
    assert marked[2].startswith("| 20-NN, val, 200 images | 72.00 ± ")
    assert marked[3].startswith("| difference to cls | +")
    assert marked[5].startswith("- ")


# --- The bootstrap


def correct(accuracy: float, count: int, seeds: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Seeds that are wrong on the same images."""
    hardness = rng.random(count)
    return [hardness + 0.2 * rng.standard_normal(count) < accuracy for _ in range(seeds)]


def test_interval_equals_the_analytic_one_for_many_images():
    rng = np.random.default_rng(1)
    ours, control = correct(0.7, 50_000, 3, rng), correct(0.68, 50_000, 2, rng)
    difference = 100 * (np.mean(ours, axis=0) - np.mean(control, axis=0))
    error = difference.std() / np.sqrt(50_000)
    expected = (difference.mean() - 1.96 * error, difference.mean() + 1.96 * error)
    assert paired_bootstrap(ours, control) == pytest.approx(expected, abs=0.08 * error)


def test_pairing_counts():
    """Two encoders that are wrong on almost the same images: a difference of one point is significant."""
    ours = np.arange(10_000) < 7_000
    low, high = paired_bootstrap([ours], [np.arange(10_000) < 6_900])
    assert 0.75 < low < 1.0 < high < 1.25
    assert paired_bootstrap([ours], [ours]) == (0.0, 0.0)
    assert paired_bootstrap([ours], [ours[::-1]]) == paired_bootstrap([ours], [ours[::-1]])


@pytest.mark.parametrize(
    ("values", "quantile"),
    [([0, 2], 12.706), ([1, 2, 4], 4.303), ([1, 2, 3, 4, 5], 2.776), ([*range(31)], 2.042)],
)
def test_interval_over_seeds_has_the_tabulated_quantiles(values, quantile):
    half = quantile * np.std(values, ddof=1) / np.sqrt(len(values))
    assert t_interval(values) == pytest.approx((np.mean(values) - half, np.mean(values) + half), rel=1e-3)


# --- Mistakes


def test_runs_that_are_none(tmp_path, capsys):
    with pytest.raises(UserError, match="runs is empty; give run folders"):
        compare_runs([])
    with pytest.raises(UserFileNotFoundError, match="nowhere' does not exist; expected a run folder"):
        compare_runs([str(tmp_path / "nowhere")])
    run = make_run(tmp_path / "a", result(100, name="10-NN", headline=False))
    with pytest.raises(UserError, match="a has no headline result; run `dino-sparo knn`"):
        compare_runs([run])
    (tmp_path / "a" / "results.json").write_text("{")
    assert main(["compare", run]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"{tmp_path}/a/results.json is damaged" in err and "evaluate again" in err


@pytest.mark.parametrize("text", ["- 1", "a: [", "\x00"])
def test_damaged_recipe(tmp_path, text):
    run = make_run(tmp_path / "a", result(100))
    (tmp_path / "a" / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml .*; restore the recipe"):
        compare_runs([run])


def test_a_control_that_is_none_of_the_runs_and_seeds_that_are_one(three_and_one, tmp_path):
    with pytest.raises(UserError, match=r"control '.*s0' is not one of the runs; expected one of .*d0"):
        compare_runs(three_and_one[1:], control=three_and_one[0])
    with pytest.raises(UserError, match="s0' is given twice; give it once"):
        compare_runs([*three_and_one, three_and_one[0] + "/"])
    other = make_run(tmp_path / "b", result(100), seed=0, path="/data0")
    with pytest.raises(UserError, match="same recipe and seed 0; leave one of them out"):
        compare_runs([three_and_one[0], other])


def test_the_same_seed_on_other_images_is_no_seed_of_the_recipe(tmp_path):
    runs = [make_run(tmp_path / name, result(100), path=f"/{name}") for name in ("flowers", "cars")]
    found = compare_runs(runs)
    assert found.header[1:] == [f"sparo, {run}" for run in runs]
    assert found.rows[0][1] == "50.00 ± 3.54 (1 seed)"


def test_options_that_an_older_version_did_not_write_do_not_part_its_runs(tmp_path):
    runs = [make_run(tmp_path / f"s{seed}", result(100), seed=seed) for seed in (0, 1)]
    newer = tmp_path / "s1" / "config.yaml"
    newer.write_text(newer.read_text().replace("epochs: 100", "epochs: 100, freeze_backbone_epochs: null"))
    assert compare_runs(runs).rows[0][1] == "50.00 ± 0.00 (2 seeds)"


def test_results_of_several_weights_of_a_run_are_told(tmp_path):
    of = [{"encoder": name} for name in ("earlier", "later")]
    linear = {"protocol": "linear", "name": "4 blocks"}
    run = make_run(tmp_path / "a", result(100, details=of[1]), result(99, details=of[0], **linear))
    again = make_run(tmp_path / "b", result(100, details=of[1]), result(99, details=of[1], **linear), seed=1)
    (note,) = [note for note in compare_runs([run, again]).notes if "different weights" in note]
    assert note.startswith(f"{run}: results of different weights")


def test_damaged_files_are_told(tmp_path):
    run = make_run(tmp_path / "a", result(100, details={"encoder": ["x"]}))
    assert len(compare_runs([run]).rows) == 1
    (tmp_path / "a" / "config.yaml").write_text("seed: [1]\nmodel: {readout: {name: cls}}\n")
    with pytest.raises(UserError, match=r"config\.yaml: seed is \[1\]; expected a whole number"):
        compare_runs([run])


def test_nothing_in_common(tmp_path):
    runs = [
        make_run(tmp_path / "a", result(100)),
        make_run(tmp_path / "b", result(100, protocol="linear", name="probe"), readout="cls"),
    ]
    with pytest.raises(UserError, match=r"no result in common \(sparo has 20-NN, val; cls has linear, val\)"):
        compare_runs(runs)
