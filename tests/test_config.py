"""Recipes, overrides, and what a mistake in them is answered."""

import ast
import inspect
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dino_sparo import options as opt
from dino_sparo.config import find_recipe, leaf_keys, parse_options, recipes
from dino_sparo.errors import UserError
from dino_sparo.options import KnnOptions, PretrainOptions
from dino_sparo.training.checkpoint import encoder_of
from dino_sparo.training.rundir import config_of, start_run_dir

SPARO, DINO, LONG = "imagenet_vits16_sparo", "imagenet_vits16_dino", "imagenet_vits16_sparo_300ep"
REQUIRED = ("--data.path", "x", "--run_dir", "y")
KEYS = leaf_keys(PretrainOptions)
EXPERIMENT = ("data", "views", "model", "head", "loss", "optim")
OPTIONS_CLASSES = [
    member for _, member in inspect.getmembers(opt, inspect.isclass) if member.__module__ == opt.__name__
]


def parse(*arguments: str, options_class: type = PretrainOptions) -> Any:
    return parse_options(options_class, list(arguments), usage="usage")


def parsed(recipe: str, *arguments: str) -> dict[str, Any]:
    return config_of(parse("--config", recipe, *REQUIRED, *arguments))


def content(recipe: str = "photos_sparo") -> dict[str, Any]:
    return yaml.safe_load(recipes()[recipe].read_text())


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What `other` has instead, by dotted key."""
    one, other = flat(one), flat(other)
    return {key: other.get(key) for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def changed(key: str, value: Any = MISSING) -> str:
    """The photo recipe as text, with another value at a key, or without the key."""
    recipe = content()
    *sections, name = key.split(".")
    place = recipe
    for section in sections:
        place = place.setdefault(section, {})
    if value is MISSING:
        del place[name]
    else:
        place[name] = value
    return yaml.safe_dump(recipe)


def refused(tmp_path: Path, recipe: str, *arguments: str) -> str:
    """The message about a recipe with this text."""
    (tmp_path / "recipe.yaml").write_text(recipe)
    required = REQUIRED[2:] if "\n  path:" in recipe else REQUIRED
    return refusal("--config", str(tmp_path / "recipe.yaml"), *required, *arguments)


def refusal(*arguments: str, options_class: type = PretrainOptions) -> str:
    with pytest.raises(UserError) as caught:
        parse(*arguments, options_class=options_class)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Shipped recipes


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipe_parses_and_builds(name):
    config = parsed(name)
    encoder = encoder_of(config)
    readout = config["model"]["readout"]
    if readout["name"] == "sparo":
        assert encoder.embed_dim == readout["num_slots"] * readout["slot_dim"]
    assert encoder.backbone.native_grid * encoder.backbone.patch_size == config["views"]["global_size"]


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
        "readout": {"name": "sparo", "num_slots": 64, "slot_dim": 64, "key_dim": 64, "group_size": 1},
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
    }


def test_control_differs_in_the_readout_alone():
    assert differences(parsed(SPARO), parsed(DINO)) == {
        "model.readout.name": "cls",
        "model.readout.num_slots": None,
        "model.readout.slot_dim": None,
        "model.readout.key_dim": None,
        "model.readout.group_size": None,
    }


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


@pytest.mark.parametrize("options_class", [PretrainOptions, KnnOptions, opt.BenchOptions])
def test_help_shows_every_key_and_docstring(options_class, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = ""
    for argument in ["--help", *(["--model.arch.help"] if options_class is PretrainOptions else [])]:
        with pytest.raises(SystemExit) as caught:
            parse(argument, options_class=options_class)
        assert caught.value.code == 0
        shown += " ".join(capsys.readouterr().out.split())

    def check(prefix: str, section: type) -> None:
        body = ast.parse(inspect.getsource(section)).body[0].body
        texts = [s.value.value for s in body if isinstance(s, ast.Expr)][1:]  # the first is the class's own
        for field, text in zip(fields(section), texts, strict=True):
            kinds = [kind for kind in (field.type, *typing.get_args(field.type)) if is_dataclass(kind)]
            if field.type not in kinds:
                assert f"--{prefix}{field.name} " in shown
                assert " ".join(text.split()) in shown
            for kind in kinds:
                check(f"{prefix}{field.name}.", kind)

    check("", options_class)


@pytest.mark.parametrize("section", EXPERIMENT)
def test_experiment_has_no_defaults(section):
    def check(section_class: type) -> None:
        for field in fields(section_class):
            optional = type(None) in typing.get_args(field.type)
            assert optional or (field.default is MISSING and field.default_factory is MISSING), field.name
            if is_dataclass(field.type):
                check(typing.cast(type, field.type))

    check(next(field.type for field in fields(PretrainOptions) if field.name == section))


@pytest.mark.parametrize(
    "key",
    [
        key
        for key, value in flat(content()).items()
        if value is not None and not key.startswith(("monitor.", "model.readout."))
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


@pytest.mark.parametrize("name", recipes())
def test_resolved_config_fed_back_gives_equal_options(tmp_path, name):
    given = ("--optim.final_lr", "1e-7", "--data.max_images", "9", "--machine.num_workers", "0")
    options = parse("--config", name, "--data.path", "x", "--run_dir", str(tmp_path), *given)
    start_run_dir(tmp_path, config_of(options))
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


# --- Mistakes: (key, value, what the message says besides the key)

ARCH = {"width": 64, "depth": 2, "num_heads": 2}
WRONG_TYPE = [
    ("optim.epochs", "many", "is many; expected a whole number"),
    ("optim.epochs", 3.5, "is 3.5; expected a whole number"),
    ("optim.epochs", True, "is True; expected a whole number"),
    ("optim.epochs", [3], "is [3]; expected a whole number"),
    ("optim.epochs", {"a": 1}, "is a section here; expected a whole number"),
    ("optim.lr_per_256", "fast", "is fast; expected a number"),
    ("optim.lr_per_256", True, "is True; expected a number"),
    ("data.path", 5, "is 5; expected text"),
    ("data.max_images", "all", "is all; expected a whole number or null"),
    ("head.norm_last_layer", 1, "is 1; expected true or false"),
    ("views.global_scale", [0.4], "is [0.4]; expected a list of 2"),
    ("views.jitter_strength", [0.1] * 3, "is [0.1, 0.1, 0.1]; expected a list of 4"),
    ("views.global_scale", 0.4, "is 0.4; expected a list of 2"),
    ("views.global_scale", [0.4, "a"], "is a; expected a list of 2: a number, a number"),
    ("machine.device", "gpu", "is gpu; expected one of auto, cuda, cpu"),
    ("model.readout.name", "spar0", "is spar0; expected one of sparo, cls, gap"),
    ("model.readout", "sparo", "is 'sparo'; expected a section with name, num_slots"),
    ("model.arch", "vit_smal", "is vit_smal; expected one of vit_tiny, vit_small, vit_base or a section"),
    ("model.arch", ARCH | {"num_heads": "two"}, "is two; expected one of vit_tiny"),
    ("optim", 5, "is 5; expected a section with epochs, global_batch_size"),
    ("monitor", None, "is None; expected a section with knn_every_epochs"),
]
OUT_OF_RANGE = [
    ("seed", -1, "is -1; expected 0 to"),
    ("seed", 2**63, f"is {2**63}; expected 0 to"),
    ("optim.epochs", 0, "is 0; expected a finite number above 0"),
    ("optim.lr_per_256", 0.0, "is 0.0; expected a finite number above 0"),
    ("optim.clip_norm", -3.0, "is -3.0; expected a finite number of at least 0"),
    ("model.patch_size", -8, "is -8; expected a finite number above 0"),
    ("machine.num_workers", -1, "is -1; expected a finite number of at least 0"),
    ("optim.lr_per_256", float("nan"), "is nan; expected a finite number"),
    ("loss.teacher_temp", float("inf"), "is inf; expected a finite number"),
    ("views.flip_probability", float("nan"), "is nan; expected 0 to 1"),
    (
        "views.jitter_strength",
        [float("inf"), 0.0, 0.0, 0.0],
        "is [inf, 0.0, 0.0, 0.0]; expected a finite number",
    ),
    ("views.flip_probability", 1.5, "is 1.5; expected 0 to 1"),
    ("views.blur_probability", [1.0, -0.1, 0.5], "is [1.0, -0.1, 0.5]; expected 0 to 1"),
    ("optim.teacher_momentum", 1.1, "is 1.1; expected 0 to 1"),
    ("loss.center_momentum", 1.0, "is 1.0; expected at least 0 and below 1"),
    ("model.drop_path_rate", 1.0, "is 1.0; expected at least 0 and below 1"),
    ("data.path", "", "is empty"),
]
DO_NOT_FIT = [
    ("optim.warmup_epochs", 31, "is 31, longer than the run: optim.epochs is 30; use at most 30"),
    ("loss.warmup_teacher_temp_epochs", 31, "is 31, longer than the run: optim.epochs is 30; use at most 30"),
    ("optim.freeze_last_layer_epochs", 31, "is 31, longer than the run: optim.epochs is 30; use at most 30"),
    ("views.global_size", 50, "is 50, not divisible by model.patch_size 8; use a multiple, such as 48"),
    ("views.local_size", 23, "is 23, not divisible by model.patch_size 8; use a multiple, such as 24"),
    ("model.arch.width", 130, "is 130, not divisible by model.arch.num_heads 4"),
    ("model.arch.depth", 1, "is 1; expected at least 2 with sparo"),
    ("model.readout.group_size", 3, "is 3, which does not divide model.readout.num_slots 16; use a divisor"),
    ("model.readout.num_slots", MISSING, "is missing; sparo needs num_slots"),
    ("model.readout.key_dim", None, "is missing; sparo needs num_slots"),
    ("views.global_scale", [0.9, 0.4], "is [0.9, 0.4]; expected the lowest, then the highest"),
    ("views.local_scale", [0.1, 1.1], "is [0.1, 1.1]; expected the lowest, then the highest"),
    ("views.blur_radius", [2.0, 1.0], "is [2.0, 1.0]; expected the lowest, then the highest, in pixels"),
    ("views.jitter_strength", [0.1, 0.1, 0.1, 0.6], "0.6]; expected its last number (hue) to be at most 0.5"),
]


@pytest.mark.parametrize(("key", "value", "expected"), WRONG_TYPE + OUT_OF_RANGE + DO_NOT_FIT)
def test_wrong_value_in_a_recipe(tmp_path, key, value, expected):
    message = refused(tmp_path, changed(key, value))
    assert key in message and expected in message


@pytest.mark.parametrize(
    ("key", "value", "expected"), [case for case in DO_NOT_FIT if case[1] is not MISSING]
)
def test_wrong_value_on_the_command_line(key, value, expected):
    message = refusal("--config", "photos_sparo", *REQUIRED, f"--{key}={'null' if value is None else value}")
    assert key in message and expected in message


@pytest.mark.parametrize("name", ["cls", "gap"])
def test_slots_without_sparo(tmp_path, name):
    message = refused(tmp_path, changed("model.readout.name", name))
    assert f"model.readout.num_slots is 16, but model.readout.name is {name!r}" in message
    assert "set it to null" in message


@pytest.mark.parametrize("missing", ARCH)
def test_arch_with_a_missing_field(tmp_path, missing):
    arch = {name: value for name, value in ARCH.items() if name != missing}
    assert refused(tmp_path, changed("model.arch", arch)).startswith(f"missing: model.arch.{missing}; ")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.epoch", "optim.epochs"),
        ("sede", "seed"),
        ("model.arch.num_head", "model.arch.num_heads"),
        ("optim.teacher_temp", "loss.teacher_temp"),
        ("epochs", "optim.epochs"),
        ("model.readout.slots", "model.readout.num_slots"),
    ],
)
def test_unknown_key_suggests_the_nearest(tmp_path, key, nearest):
    hint = f"is unknown; did you mean {nearest!r}?"
    assert f"{tmp_path / 'recipe.yaml'}: key {key!r} {hint}" in refused(tmp_path, changed(key, 3))
    assert f"option --{key} {hint}" in refusal("--config", "photos_sparo", *REQUIRED, f"--{key}", "3")


PHOTOS = recipes()["photos_sparo"].read_text()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (PHOTOS + "seed: 1\n", "key 'seed' is given twice; give it once"),
        (PHOTOS.replace("  epochs: 30\n", "  epochs: 30\n  epochs: 9\n"), "key 'epochs' is given twice"),
        ("optim.epochs: 9\n" + PHOTOS, "key 'optim.epochs' is given twice"),
        ("seed: [1", "is no valid YAML"),
        ("seed: 0\n\tdata: x", "is no valid YAML"),
        ("? [a, b]\n: 1", "is no valid YAML"),
        ("!!python/object:os.system {}", "is no valid YAML"),
        ("seed: 0\n---\nseed: 1\n", "is no valid YAML"),
        ("- seed\n- data\n", "expected sections with keys"),
        ("", "expected sections with keys"),
        ("1: 2\n", "key '1' is unknown"),
    ],
)
def test_malformed_recipe(tmp_path, recipe, expected):
    message = refused(tmp_path, recipe)
    assert str(tmp_path / "recipe.yaml") in message and expected in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--optim.epochs", "3", "--optim.epochs=4"), "option --optim.epochs is given twice"),
        (("--config", "photos_sparo"), "option --config is given twice"),
        (("--optim.epochs",), "option --optim.epochs has no value; give it as --optim.epochs VALUE"),
        (("stray",), "unexpected argument 'stray'; expected: "),
        (("--views.global_scale", "0.5", "1"), "unexpected argument '1'"),
        (("-x",), "unexpected argument '-x'"),
        (("--optim", "3"), "option --optim is unknown; did you mean 'optim.epochs'?"),
        (("--optim.epochs", "many"), "optim.epochs is many; expected a whole number"),
        (("--seed", ""), "seed is ; expected a whole number"),
        (("--optim.lr_per_256", ".nan"), "optim.lr_per_256 is nan; expected a finite number above 0"),
        (("--zzz", "3"), "option --zzz is unknown; see --help"),
    ],
)
def test_malformed_command_line(arguments, expected):
    assert expected in refusal("--config", "photos_sparo", *REQUIRED, *arguments)


def test_missing_options():
    assert refusal("--config", "photos_sparo").startswith("missing: run_dir, data.path; give --run_dir VALUE")
    message = refusal(*REQUIRED)
    assert message.startswith("missing: seed, views.global_size") and all(
        name in message for name in recipes()
    )
    assert refusal("--data.path", "x", options_class=KnnOptions) == "missing: run; give --run VALUE"


@pytest.mark.parametrize("name", ["nope", "configs/nope.yaml", "elsewhere/demo.yaml", "."])
def test_recipe_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = refusal("--config", name, *REQUIRED)
    assert f"config {name!r} does not exist" in message and all(recipe in message for recipe in recipes())


@pytest.mark.parametrize("value", ["[]", "[0]", "[a]", "[2.5]"])
def test_neighbours_that_are_no_numbers(value):
    assert "k is " in refusal("--run", "x", "--data.path", "y", "--k", value, options_class=KnnOptions)
