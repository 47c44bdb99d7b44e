"""Shipped recipes, options and overrides."""

import ast
import inspect
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest

from dino_sparo.__main__ import main
from dino_sparo.cli.commands import COMMANDS
from dino_sparo.recipe.files import find_recipe, named_recipe, recipes
from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import leaves, section_of
from dino_sparo.runs.checkpoint import encoder_of
from dino_sparo.runs.rundir import start_run_dir
from dino_sparo.study.variants import read_variants
from tests.recipes import (
    EXPERIMENT,
    REQUIRED,
    changed,
    content,
    differences,
    flat,
    parse,
    parsed,
    refused,
)

SPARO, DINO, LONG = "imagenet_vits16_sparo", "imagenet_vits16_dino", "imagenet_vits16_sparo_300ep"
OPTIONS_CLASSES = sorted(
    {owner for command in COMMANDS.values() for _, _, owner in leaves(command.options)}, key=str
)


# --- Shipped recipes


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipe_parses_and_builds(name):
    recipe = named_recipe(name, {"data.path": "x"})
    encoder, readout = encoder_of(recipe), recipe.model.readout
    if readout.name == "sparo":
        assert encoder.embed_dim == readout.num_slots * readout.slot_dim
    assert encoder.backbone.native_grid * encoder.backbone.patch_size == recipe.views.global_size


def test_recipe_has_the_published_numbers():
    config = parsed(SPARO)
    assert config["seed"] == 0 and config["data"]["max_images"] is None
    assert config["views"] == {
        "global_size": 224,
        "global_scale": [0.4, 1.0],
        "local_size": 96,
        "local_scale": [0.05, 0.4],
        "num_local_crops": 8,
        "flip_probability": 0.5,
        "jitter_probability": 0.8,
        "jitter_strength": [0.4, 0.4, 0.2, 0.1],
        "grayscale_probability": 0.2,
        "blur_probability": [1.0, 0.1, 0.5],
        "blur_radius": [0.1, 2.0],
        "solarize_probability": [0.0, 0.2, 0.0],
    }
    assert config["model"] == {
        "arch": "vit_small",
        "patch_size": 16,
        "drop_path_rate": 0.1,
        "readout": {
            "name": "sparo",
            "num_slots": 64,
            "slot_dim": 64,
            "key_dim": 64,
            "group_size": 1,
            **dict.fromkeys(("heads", "num_heads", "after_last_block", "output")),
        },
    }
    assert config["head"] == {
        "num_prototypes": 65536,
        "hidden_dim": 2048,
        "bottleneck_dim": 256,
        "norm_last_layer": True,
    }
    assert config["loss"] == {
        "student_temp": 0.1,
        "warmup_teacher_temp": 0.04,
        "teacher_temp": 0.04,
        "warmup_teacher_temp_epochs": 0,
        "center_momentum": 0.9,
    }
    assert config["optim"] == {
        "epochs": 100,
        "global_batch_size": 512,
        "lr_per_256": 0.0005,
        "final_lr": 1e-6,
        "warmup_epochs": 10,
        "weight_decay": 0.04,
        "final_weight_decay": 0.4,
        "clip_norm": 3.0,
        "freeze_last_layer_epochs": 1,
        "teacher_momentum": 0.996,
        "max_bad_steps": 0,
        "freeze_backbone": False,
    }


@pytest.mark.parametrize(("sparo", "dino"), [(SPARO, DINO), ("photos_sparo", "photos_dino")])
def test_control_differs_in_the_readout_alone(sparo, dino):
    assert differences(parsed(sparo), parsed(dino)) == {
        "model.readout.name": "cls",
        "model.readout.num_slots": None,
        "model.readout.slot_dim": None,
        "model.readout.key_dim": None,
        "model.readout.group_size": None,
    }


def test_the_variant_that_studies_take_is_the_photo_control():
    assert read_variants("readouts", [])["cls"] == differences(parsed("photos_sparo"), parsed("photos_dino"))


def test_long_recipe_differs_in_the_boosted_setting_alone():
    assert differences(parsed(SPARO), parsed(LONG)) == {
        "optim.epochs": 300,
        "optim.global_batch_size": 1024,
        "loss.teacher_temp": 0.07,
        "loss.warmup_teacher_temp_epochs": 30,
        "head.norm_last_layer": False,
    }


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/demo.yaml"])
def test_shipped_recipe_is_found_from_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == recipes()["demo"]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert find_recipe(name) == Path(name)  # the given path comes first


# --- Options


@pytest.mark.parametrize("options_class", OPTIONS_CLASSES)
def test_every_field_has_a_docstring(options_class):
    body = ast.parse(inspect.getsource(options_class)).body[0].body
    undocumented = [
        statement.target.id
        for statement, following in zip(body, [*body[1:], None], strict=True)
        if isinstance(statement, ast.AnnAssign)
        and not isinstance(getattr(following, "value", None), ast.Constant)
    ]
    assert options_class.__doc__ and not undocumented


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_key_and_docstring(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*name.split(), "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())

    for key, field, owner in leaves(COMMANDS[name].options):
        assert f"--{key} " in shown
        assert " ".join(docstrings(owner)[field.name].split()) in shown


def docstrings(section: type) -> dict[str, str]:
    """The text under every field of a dataclass, and of those that it extends."""
    texts: dict[str, str] = {}
    for each in filter(is_dataclass, reversed(section.mro())):
        body = ast.parse(inspect.getsource(each)).body[0].body
        named = [s.target.id for s in body if isinstance(s, ast.AnnAssign)]
        texts |= zip(named, [s.value.value for s in body if isinstance(s, ast.Expr)][1:], strict=True)
    return texts


@pytest.mark.parametrize("section", EXPERIMENT)
def test_experiment_has_no_defaults(section):
    def check(section_class: type) -> None:
        for field in fields(section_class):
            optional = type(None) in typing.get_args(field.type) or field.name == "freeze_backbone"
            assert optional or (field.default is MISSING and field.default_factory is MISSING), field.name
            if (inner := section_of(field.type)) is not None:
                check(inner)

    check(section_of(next(field.type for field in fields(Recipe) if field.name == section)))


@pytest.mark.parametrize(
    "key",
    [
        key
        for key, value in flat(content()).items()
        if value is not None and not key.startswith(("monitor.", "model.readout.", "data.max_side"))
    ],
)
def test_every_key_of_the_experiment_is_required(tmp_path, key):
    message = refused(tmp_path, changed(key))
    assert message.startswith(f"missing: {key}; ") and "--section.key VALUE" in message


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


@pytest.mark.parametrize("name", recipes())
def test_resolved_config_fed_back_gives_equal_options(tmp_path, name):
    given = ("--optim.final_lr", "1e-7", "--data.max_images", "9", "--machine.num_workers", "0")
    options = parse("--config", name, "--data.path", "x", "--run_dir", str(tmp_path), *given)
    start_run_dir(tmp_path, options, {})
    assert parse("--config", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path)) == options


def test_names_that_look_like_numbers_stay_text():
    options = parse("--config", "photos_sparo", "--data.path", "2024", "--run_dir", "7")
    assert (options.data.path, options.run_dir) == ("2024", "7")


def test_yaml_anchors_and_exponents_without_a_dot(tmp_path):
    recipe = (
        recipes()["photos_sparo"]
        .read_text()
        .replace("1.0e-6", "1e-6")
        .replace("monitor:", "monitor: &monitor")
    )
    (tmp_path / "r.yaml").write_text(recipe.replace("head:\n", "head:\n  <<: {hidden_dim: 9}\n", 1))
    options = parse("--config", str(tmp_path / "r.yaml"), *REQUIRED)
    assert options.optim.final_lr == 1e-6
    assert options.head.hidden_dim == 512  # a merged value is a default, not a second one
