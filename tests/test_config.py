"""Shipped recipes, options and overrides."""

from dataclasses import MISSING, replace
from pathlib import Path

import pytest

from dino_sparo.__main__ import main
from dino_sparo.cli.commands import COMMANDS
from dino_sparo.cli.evaluating import KnnOptions
from dino_sparo.models import build_encoder
from dino_sparo.recipe.files import find_recipe, named_recipe, recipes
from dino_sparo.recipe.readouts import PoolerOptions, SparoOptions
from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import flattened, leaf_keys, leaves
from dino_sparo.runs.rundir import start_run_dir
from dino_sparo.study.variants import read_variants
from tests.recipes import REQUIRED, changed, content, differences, parse, parsed, refused

SPARO, DINO, LONG = "imagenet_vits16_sparo", "imagenet_vits16_dino", "imagenet_vits16_sparo_300ep"


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipe_parses_builds_and_is_what_its_run_folder_holds(name, tmp_path):
    recipe = named_recipe(name, {"data.path": "x"})
    encoder, readout = build_encoder(**recipe.encoder_arguments()), recipe.model.readout
    if readout.name == "sparo":
        assert encoder.embed_dim == readout.num_slots * readout.slot_dim
    assert encoder.backbone.native_grid * encoder.backbone.patch_size == recipe.views.global_size

    given = ("--optim.final_lr", "1e-7", "--data.max_images", "9", "--machine.num_workers", "0")
    options = parse("--config", name, "--data.path", "x", "--run_dir", str(tmp_path), *given)
    start_run_dir(tmp_path, options, {})
    assert parse("--config", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path)) == options


def test_recipe_has_the_published_numbers():
    published = {
        "seed": 0,
        "data.max_images": None,
        "views.global_size": 224,
        "views.local_size": 96,
        "views.global_scale": [0.4, 1.0],
        "views.local_scale": [0.05, 0.4],
        "views.num_local_crops": 8,
        "views.flip_probability": 0.5,
        "views.jitter_probability": 0.8,
        "views.jitter_strength": [0.4, 0.4, 0.2, 0.1],
        "views.grayscale_probability": 0.2,
        "views.blur_radius": [0.1, 2.0],
        "views.blur_probability": [1.0, 0.1, 0.5],
        "views.solarize_probability": [0.0, 0.2, 0.0],
        "model.arch": "vit_small",
        "model.patch_size": 16,
        "model.drop_path_rate": 0.1,
        "model.readout.num_slots": 64,
        "model.readout.slot_dim": 64,
        "model.readout.key_dim": 64,
        "model.readout.group_size": 1,
        "head.num_prototypes": 65536,
        "head.hidden_dim": 2048,
        "head.bottleneck_dim": 256,
        "head.norm_last_layer": True,
        "loss.student_temp": 0.1,
        "loss.warmup_teacher_temp": 0.04,
        "loss.warmup_teacher_temp_epochs": 0,
        "loss.teacher_temp": 0.04,
        "loss.center_momentum": 0.9,
        "optim.epochs": 100,
        "optim.global_batch_size": 512,
        "optim.lr_per_256": 0.0005,
        "optim.final_lr": 1e-6,
        "optim.warmup_epochs": 10,
        "optim.freeze_last_layer_epochs": 1,
        "optim.weight_decay": 0.04,
        "optim.final_weight_decay": 0.4,
        "optim.clip_norm": 3.0,
        "optim.teacher_momentum": 0.996,
    }
    recipe = parsed(SPARO)
    assert {key: recipe[key] for key in published} == published


def test_a_default_that_is_written_out_is_the_same_recipe():
    plain = SparoOptions(name="sparo", num_slots=4, slot_dim=4, key_dim=4, group_size=1)
    assert replace(plain, after_last_block=False, heads="separate") == plain
    pooler = PoolerOptions(name="pooler", num_slots=4, slot_dim=4, num_heads=2)
    assert replace(pooler, after_last_block=False) == pooler


def test_recipes_differ_from_their_controls_in_one_setting_alone():
    readout = {f"model.readout.{key}": None for key in ("num_slots", "slot_dim", "key_dim", "group_size")}
    readout["model.readout.name"] = "cls"
    for sparo in (SPARO, "imagenet_vitb16_sparo", "imagenet_vits8_sparo", "photos_sparo"):
        assert differences(sparo, sparo.replace("sparo", "dino")) == readout
    assert differences("continue_vits16_sparo", "continue_vits16") == readout
    assert read_variants("readouts", [])["cls"] == readout
    assert differences(SPARO, LONG) == {
        "optim.epochs": 300,
        "optim.global_batch_size": 1024,
        "loss.teacher_temp": 0.07,
        "loss.warmup_teacher_temp_epochs": 30,
        "head.norm_last_layer": False,
    }
    assert differences("imagenet_vits16_dino", "imagenet_vitb16_dino") == {
        "views.global_scale": [0.25, 1.0],
        "views.local_scale": [0.05, 0.25],
        "views.num_local_crops": 10,
        "model.arch": "vit_base",
        "loss.teacher_temp": 0.07,
        "loss.warmup_teacher_temp_epochs": 50,
        "optim.epochs": 400,
        "optim.global_batch_size": 1024,
        "optim.lr_per_256": 0.00075,
        "optim.final_lr": 2e-6,
        "optim.clip_norm": 0.3,
        "optim.freeze_last_layer_epochs": 3,
    }
    assert differences("imagenet_vits16_dino", "imagenet_vits8_dino") == {
        "views.num_local_crops": 10,
        "model.patch_size": 8,
        "loss.teacher_temp": 0.07,
        "loss.warmup_teacher_temp_epochs": 30,
        "head.norm_last_layer": False,
        "optim.epochs": 800,
        "optim.global_batch_size": 1024,
    }


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/demo.yaml"])
def test_shipped_recipe_is_found_from_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == recipes()["demo"]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert find_recipe(name) == Path(name)  # the given path comes first


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_option_and_what_it_is(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*name.split(), "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for key, kind in leaf_keys(COMMANDS[name].options).items():
        value = "[VALUE]" if kind is bool else "VALUE"
        # What it takes comes last.
        assert f"--{key} {value} " in shown and f"--{key} {value} (" not in shown


def test_experiment_has_no_defaults():
    experiment = ("data", "views", "model", "head", "loss", "optim")
    for key, (field, _) in leaves(Recipe).items():
        if key.startswith(experiment) and key != "optim.freeze_backbone":
            assert field.default in (MISSING, None) and field.default_factory is MISSING, key


@pytest.mark.parametrize(
    "key",
    [
        key
        for key, value in flattened(content()).items()
        if value is not None and not key.startswith(("monitor.", "model.readout.", "data.max_side"))
    ],
)
def test_every_key_of_the_experiment_is_required(tmp_path, key):
    assert refused(tmp_path, changed(key)).startswith(f"missing: {key}; ")


def test_command_line_overrides_the_recipe_in_any_order():
    for arguments in (
        ("--config", "photos_sparo", "--optim.epochs", "5"),
        ("--optim.epochs=5", "--config=photos_sparo"),
    ):
        options = parse(*arguments, *REQUIRED, "--views.global_scale", "[0.5, 0.9]", "--model.arch.width=64")
        assert options.optim.epochs == 5
        assert options.views.global_scale == (0.5, 0.9)
        assert vars(options.model.arch) == {"width": 64, "depth": 6, "num_heads": 4}
    assert parse("--config", "photos_sparo", *REQUIRED, "--model.arch", "vit_tiny").model.arch == "vit_tiny"
    arch = parse("--config", "photos_sparo", *REQUIRED, "--model.arch={width: 64, depth: 2, num_heads: 4}")
    assert vars(arch.model.arch) == {"width": 64, "depth": 2, "num_heads": 4}


def test_names_that_look_like_numbers_stay_text():
    options = parse("--config", "photos_sparo", "--data.path", "2024", "--run_dir", "7")
    assert (options.data.path, options.run_dir) == ("2024", "7")


def test_yaml_anchors_and_exponents_without_a_dot(tmp_path):
    text = recipes()["photos_sparo"].read_text().replace("1.0e-6", "1e-6").replace("monitor:", "monitor: &x")
    (tmp_path / "r.yaml").write_text(text.replace("head:\n", "head:\n  <<: {hidden_dim: 9}\n", 1))
    options = parse("--config", str(tmp_path / "r.yaml"), *REQUIRED)
    assert options.optim.final_lr == 1e-6
    assert options.head.hidden_dim == 512  # a merged value is a default, not a second one


def test_options_of_other_commands_come_from_files_too(tmp_path):
    (tmp_path / "knn.yaml").write_text("run: r\nk: [1, 3]\n")
    given = (f"--config={tmp_path / 'knn.yaml'}", "--data.path=d")
    options = parse(*given, options_class=KnnOptions)
    assert (options.run, options.k, options.data.path) == ("r", [1, 3], "d")
