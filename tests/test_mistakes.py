"""What a mistake in a recipe or on the command line is answered."""

import pytest

from dino_sparo.cli.evaluating import KnnOptions, LinearOptions
from dino_sparo.cli.pretraining import PretrainOptions
from dino_sparo.errors import UserError
from dino_sparo.recipe.files import recipes
from tests.recipes import REQUIRED, changed, content, parse, refusal, refused
from tests.tiny import build_state

PHOTOS = recipes()["photos_sparo"].read_text()
NO_KEYS = {"key_dim": None, "group_size": None}
NO_SLOTS = {"num_slots": None, "slot_dim": None, **NO_KEYS}


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("optim.epochs", ["many", 3.5, True, [3], 0, 100_001, 10**12], "a whole number from 1 to 100,000"),
        ("optim.lr_per_256", ["fast", True, 0.0, float("nan"), float("inf")], "a number above 0"),
        ("data.path", [5], "text"),
        ("data.max_images", ["all"], "a whole number above 0 or null"),
        ("head.norm_last_layer", [1], "true or false"),
        ("views.global_scale", [[0.4], 0.4, [0.1, 1.1]], "a list of 2, each a number above 0 and at most 1"),
        ("views.jitter_strength", [[0.1] * 3, [float("inf"), 0, 0, 0], [0.1, 0.1, 0.1, 0.6]], "a list ["),
        ("machine.device", ["gpu"], "one of auto, cuda, cpu"),
        ("model.readout.name", ["spar0"], "one of sparo, cls"),
        ("model.readout.key_dim", [None], "a whole number from 1 to 65,536"),
        ("model.arch", ["vit_smal"], "one of vit_tiny, vit_small, vit_base, or a section with width, depth"),
        ("optim", [5], "a section with epochs, global_batch_size"),
        ("monitor", [None], "a section with knn_every_epochs"),
        ("seed", [-1, 2**63], "a whole number from 0 to 2**63 - 1"),
        ("optim.clip_norm", [-3.0], "a number of at least 0"),
        ("machine.num_workers", [-1, 10**7], "a whole number from 0 to 1,024 or null"),
        ("optim.global_batch_size", [10**12], "a whole number from 1 to 1,048,576"),
        ("model.readout.num_slots", [10**9], "a whole number from 1 to 65,536"),
        ("model.patch_size", [3000], "a whole number from 1 to 1,024"),
        ("model.arch.width", [10**6], "a whole number from 1 to 65,536"),
        ("model.arch.depth", [10**8], "a whole number from 1 to 256"),
        ("head.num_prototypes", [10**12], "a whole number from 1 to 16,777,216"),
        ("views.num_local_crops", [10**9], "a whole number from 0 to 100"),
        ("views.blur_radius", [[0.1, 1e30], [0.1, 1000.1]], "a list of 2, each a number from 0 to 1,000"),
        ("data.max_side", [10**30], "a whole number from 1 to 16,384 or null"),
        ("views.global_size", [16 * 10**8], "a whole number from 1 to 16,384"),
        ("machine.batch_size_per_gpu", [10**12], "a whole number from 1 to 1,048,576 or null"),
        ("log.log_every_steps", [10**30], "a whole number above 0"),
        ("loss.teacher_temp", [float("inf")], "a number above 0"),
        ("machine.prefetch_batches", [10**9], "a whole number from 1 to 1,024"),
        ("machine.data_timeout_seconds", [1501], "a whole number from 1 to 1500"),
        (
            "views.blur_probability",
            [[1.0, -0.1, 0.5], [1.0, 0.1, 1.5]],
            "a list of 3, each a number from 0 to 1",
        ),
        ("loss.center_momentum", [1.0], "a number of at least 0 and below 1"),
    ],
)
def test_wrong_value_in_a_recipe(tmp_path, key, values, expected):
    for value in values:
        message = refused(tmp_path, changed(key, value))
        assert f"{key}" in message and f"is {value}; expected {expected}" in message
        assert str(tmp_path / "recipe.yaml") in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optim.warmup_epochs", 31, "is 31, longer than the run: optim.epochs is 10"),
        ("loss.warmup_teacher_temp_epochs", 31, "is 31, longer than the run: optim.epochs is 10"),
        ("optim.freeze_last_layer_epochs", 31, "is 31, longer than the run: optim.epochs is 10"),
        ("views.global_size", 50, "is 50, not divisible by model.patch_size 12; use a multiple, such as 48"),
        ("views.local_size", 23, "is 23, not divisible by model.patch_size 12; use a multiple, such as 24"),
        ("model.arch.width", 130, "is 130, not divisible by model.arch.num_heads 4"),
        ("model.arch.depth", 1, "is 1; expected at least 2 with sparo"),
        ("model.readout.group_size", 3, "is 3, which does not divide model.readout.num_slots 16"),
        ("views.global_scale", [0.9, 0.4], "is [0.9, 0.4]; expected the lowest, then the highest"),
        ("views.blur_radius", [2.0, 1.0], "is [2.0, 1.0]; expected the lowest, then the highest"),
        ("optim.freeze_backbone", True, "is true, but init is null"),
    ],
)
def test_values_that_do_not_fit_together(tmp_path, key, value, expected):
    for message in (
        refused(tmp_path, changed(key, value)),
        refusal("--config", "photos_sparo", *REQUIRED, f"--{key}={value}"),
    ):
        assert f"{key} {expected}" in message or (key in message and expected in message)


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"name": "cls"}, "slot_dim", "is 32, but model.readout.name is 'cls'"),
        ({"name": "cls", **NO_SLOTS, "after_last_block": True}, "after_last_block", "is True, but"),
        ({"name": "pooler"}, "key_dim", "is 32, but model.readout.name is 'pooler'"),
        ({"bottleneck_dim": 8}, "bottleneck_dim", "is 8, but model.readout.name is 'sparo'"),
        ({"heads": "multi"}, "group_size", "is 1, but model.readout.name is 'sparo' with multi heads"),
        ({"num_heads": 2}, "num_heads", "is 2, but model.readout.name is 'sparo' with separate heads"),
        ({"heads": "multi", "group_size": None}, "num_heads", "is missing"),
        ({"group_size": None}, "group_size", "is missing"),
        ({"heads": "many"}, "heads", "is many; expected one of separate, multi, or null"),
        ({"after_last_block": 3}, "after_last_block", "is 3; expected true or false or null"),
        ({"name": "pooler", **NO_KEYS, "num_heads": 5}, "num_heads", "is 5, which does not divide"),
    ],
)
def test_readouts_and_fields_that_are_not_theirs(tmp_path, changes, key, reason):
    readout = content()["model"]["readout"] | changes
    assert f"model.readout.{key} {reason}" in refused(tmp_path, changed("model.readout", readout))


@pytest.mark.parametrize("name", ["sparo", "pooler"])
def test_one_block_is_enough_for_what_follows_it(tmp_path, name):
    own = {"name": "pooler", "key_dim": "null", "group_size": "null", "num_heads": 4}
    given = ("--config", "photos_sparo", *REQUIRED, "--model.arch.depth=1")
    if name == "pooler":
        given += tuple(f"--model.readout.{key}={value}" for key, value in own.items())
    assert f"model.arch.depth is 1; expected at least 2 with {name}" in refusal(*given)
    assert parse(*given, "--model.readout.after_last_block=true").model.arch.depth == 1


@pytest.mark.parametrize(
    ("key", "value", "missing"),
    [
        ("model.arch", {"width": 64, "depth": 2}, "model.arch.num_heads"),
        ("model.readout", {"name": "pooler", "num_slots": 16, "slot_dim": 32}, "model.readout.num_heads"),
        ("model.readout", {"name": "bottleneck"}, "model.readout.bottleneck_dim, model.readout.encoding_dim"),
    ],
)
def test_fields_that_a_section_needs(tmp_path, key, value, missing):
    assert refused(tmp_path, changed(key, value)).startswith(f"missing: {missing}; ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ("--model.arch", "vit_tiny", "--model.arch.width", "32"),
            "model.arch is vit_tiny, but model.arch.width is given too; give either model.arch alone, or all "
            "of model.arch.width, model.arch.depth, model.arch.num_heads",
        ),
        (  # the recipe has a name there, which this replaces
            ("--model.arch.width", "32"),
            "missing: model.arch.depth, model.arch.num_heads; give --model.arch.depth VALUE",
        ),
    ],
)
def test_an_arch_is_either_a_name_or_sizes(given, message):
    assert refusal("--config", "imagenet_vits16_sparo", *REQUIRED, *given).startswith(message)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.epoch", "optim.epochs"),
        ("sede", "seed"),
        ("model.arch.num_head", "model.arch.num_heads"),
        ("optim.teacher_temp", "loss.teacher_temp"),
    ],
)
def test_unknown_key_suggests_the_nearest(tmp_path, key, nearest):
    hint = f"is unknown; did you mean {nearest!r}?"
    assert f"{tmp_path / 'recipe.yaml'}: key {key!r} {hint}" in refused(tmp_path, changed(key, 3))
    assert f"option --{key} {hint}" in refusal("--config", "photos_sparo", *REQUIRED, f"--{key}", "3")


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (PHOTOS + "seed: 1\n", "key 'seed' is given twice"),
        (PHOTOS.replace("  epochs: 10\n", "  epochs: 10\n  epochs: 9\n"), "key 'epochs' is given twice"),
        ("optim.epochs: 9\n" + PHOTOS, "key 'optim.epochs' is given twice"),
        ("? [a, b]\n: 1", "not valid YAML"),
        ("- seed\n- data\n", "expected sections with keys"),
        ("", "expected sections with keys"),
        ("1: 2\n", "key '1' is unknown"),
        ("seed: {a: 1}\n", "key 'seed' is {'a': 1}; expected a whole number"),
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
        (("--optim.epochs",), "option --optim.epochs has no value"),
        (("stray",), "unexpected argument 'stray'; expected: "),
        (("--optim.epochs", "3", "4"), "unexpected argument '4'"),
        (("--views.global_scale", "0.5", "1", "--views.global_scale", "0.4"), "global_scale is given twice"),
        (("--views.global_scale", "0.5", "1", "1"), "views.global_scale is 0.5 1 1; expected a list of 2"),
        (("-x",), "unexpected argument '-x'"),
        (("--optim", "3"), "option --optim is unknown; did you mean 'optim.epochs'?"),
        (("--seed", ""), "seed is empty; give at least one value"),
        (("--optim.lr_per_256", ".nan"), "optim.lr_per_256 is .nan; expected a number above 0"),
        (("--model.arch={width: 64, dept: 2}",), "'model.arch.dept' is unknown; did you mean 'model.arch.d"),
        (("--model.arch={width: [}",), "model.arch is {width: [}; expected one of vit_tiny"),
        (("--zzz", "3"), "option --zzz is unknown; see --help"),
        (("--dryrun",), "did you mean 'dry_run'?"),
    ],
)
def test_malformed_command_line(arguments, expected):
    assert expected in refusal("--config", "photos_sparo", *REQUIRED, *arguments)


@pytest.mark.parametrize(
    ("words", "options_class", "meant"),
    [
        ("lr learning-rate", PretrainOptions, "optim.lr_per_256"),
        ("batch_size bs", PretrainOptions, "optim.global_batch_size"),
        ("gpus nproc-per-node", PretrainOptions, "nproc"),
        ("wd", PretrainOptions, "optim.weight_decay"),
        ("output_dir out", PretrainOptions, "run_dir"),
        ("data_path data", PretrainOptions, "data.path"),
        ("pretrained", PretrainOptions, "init"),
        ("lr", LinearOptions, "learning_rates"),
        ("pretrained_weights checkpoint", KnnOptions, "run"),
        ("nb_knn", KnnOptions, "k"),
    ],
)
def test_words_of_other_programs_are_told_ours(words, options_class, meant):
    for word in words.split():
        assert f"did you mean {meant!r}?" in refusal(f"--{word}", "1", options_class=options_class)


def test_missing_options():
    message = refusal("--config", "photos_sparo")
    assert message == "missing: data.path, run_dir; give --data.path VALUE --run_dir VALUE"
    message = refusal()
    assert message.startswith("missing: seed, data.path, ") and " more; start from a recipe" in message
    assert all(name in message for name in recipes())
    assert refusal("--data.path", "x", options_class=KnnOptions).startswith("missing: run; ")


@pytest.mark.parametrize("name", ["nope", "configs/nope.yaml", "elsewhere/demo.yaml", "."])
def test_recipe_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = refusal("--config", name, *REQUIRED)
    assert f"config {name!r} does not exist" in message and all(recipe in message for recipe in recipes())


@pytest.mark.parametrize("value", ["[]", "[ ]", "[0]", "[a]", "[2.5]"])
def test_neighbors_that_are_no_numbers(value):
    assert "k is " in refusal("--run", "x", "--data.path", "y", "--k", value, options_class=KnnOptions)


@pytest.mark.parametrize("size", ["model.arch={width: 65536, depth: 256, num_heads: 64}", "optim.epochs=9"])
def test_a_model_larger_than_the_memory(size):
    more = ("--head.num_prototypes=16777216", "--head.bottleneck_dim=65536", "--model.drop_path_rate=0")
    recipe = parse("--config", "photos_sparo", *REQUIRED, f"--{size}", *more)
    with pytest.raises(UserError, match=r"student and teacher need [0-9,]+ GiB of memory"):
        build_state(recipe)
