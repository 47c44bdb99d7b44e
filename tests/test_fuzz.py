"""Mutated files of every kind through everything that reads files of strangers.

A few hundred by default. All of them, in about 15 minutes:

    DINO_SPARO_FUZZ=20000 .venv/bin/pytest tests/test_fuzz.py

Every input is a function of the seed ($DINO_SPARO_FUZZ_SEED, 0) and its number, and nothing of it stays.
Some of them again: `python -m tests.test_fuzz SEED FIRST LAST`. They are read in a process of its own, so
that one that is killed is seen; each may take ten times what the good files of its kind take.
"""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache, partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

SEED = int(os.environ.get("DINO_SPARO_FUZZ_SEED", "0"))
COUNT = int(os.environ.get("DINO_SPARO_FUZZ", "300"))
OLDER = Path(__file__).parent / "older"
STUDY = OLDER / "study" / "sparo"
TIMES = 10  # the time and memory of good files
LEAST_SECONDS, LEAST_MB = 2.0, 48.0  # below which nobody looks
PIXELS = 2**19  # that an image may have here: one that is allowed is little larger than the good ones
ODD = [None, True, -1, 0, 10**30, 1e300, float("nan"), "", "\x1b[31m\n", "a\0b", "\ud800", [], {}, [[]]]
ODD += ["9" * 5000, {"a": [1]}, [1, "x"], "../x", "/dev/zero", 3.5, "1e3", [-1] * 40]


@pytest.mark.long
@pytest.mark.timeout(300 + COUNT)
def test_mutated_files_raise_our_errors_alone_and_take_no_more_than_good_ones():
    print(f"seed {SEED}, {COUNT} inputs")
    command = [sys.executable, "-m", __name__, *map(str, (SEED, 0, COUNT))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200 + COUNT, check=False)
    lines = done.stdout.splitlines()
    told = "\n".join(line for line in lines if " " in line)
    last = next((line for line in reversed(lines) if " " not in line), "none")
    assert done.returncode == 0 and not told, (
        f"seed {SEED}, last number {last}:\n{told}\n{done.stderr[-4000:]}"
    )


class Kind(NamedTuple):
    """Good files of a kind by name, those of them that are changed, and what reads them all."""

    share: int
    files: dict[str, bytes]
    changed: list[str]
    readers: list[Callable[[Path, str], object]]
    alike: bool = False  # whether all files are read, whichever is changed, and most for metrics.jsonl


# --- Good files, and what reads them


def of_images() -> Kind:
    import numpy as np
    from PIL import Image

    from dino_sparo.data.decode import FORMATS
    from tests.pictures import encoded, photo

    picture, deep = photo(500, 375), Image.fromarray(np.arange(500 * 375, dtype="<u2").reshape(375, 500))
    many = {f"{kind}.jpg": encoded(picture, kind) for kind in FORMATS}
    modes = {"JPEG": ("CMYK",), "PNG": ("P", "RGBA"), "PPM": ("L",), "BMP": ("P",)}
    kinds = [(kind, mode, {}) for kind, of_kind in modes.items() for mode in of_kind]
    kinds += [("JPEG", "RGB", {"progressive": True, "subsampling": 0}), ("WEBP", "RGBA", {"lossless": True})]
    kinds += [("TIFF", "RGB", {"compression": name}) for name in ("jpeg", "lzma", "zstd", "tiff_lzw")]
    kinds += [("TIFF", mode, {"compression": "tiff_adobe_deflate"}) for mode in ("RGBA", "F", "CMYK", "1")]
    for number, (kind, mode, options) in enumerate(kinds):
        many[f"{number}.png"] = encoded(picture.convert(mode), kind, **options)
    frames = {"save_all": True, "append_images": [picture.quantize(8)]}
    many |= {"deep.png": encoded(deep, "PNG"), "frames.png": encoded(picture.quantize(64), "GIF", **frames)}
    many["plain.ppm"] = b"P3 40 30 255\n" + b"12 " * 3600
    many["float.ppm"] = b"Pf 50 40 -1.0\n" + bytes(8000)

    @cache
    def source(folder):
        from dino_sparo.data.sources import open_images
        from dino_sparo.data.splits import Choice

        return open_images(str(folder), choice=Choice(max_pixels=PIXELS))

    def read(folder, name, max_side):
        from dino_sparo.data.decode import size_of
        from dino_sparo.data.images import evaluation_crop

        images = source(folder)
        number = next(i for i in range(len(images)) if images.name(i).endswith(f"/{name}"))
        size_of(images.read(number))
        evaluation_crop(images.load(number, max_side), 32)

    def read_pixels(folder, name):
        images = source(folder)
        images.pixels(next(i for i in range(len(images)) if images.name(i).endswith(f"/{name}")))

    return Kind(
        24, many, list(many), [partial(read, max_side=None), partial(read, max_side=100), read_pixels]
    )


def of_shards() -> Kind:
    from dino_sparo.data.sources import open_images
    from dino_sparo.data.tars import damage_named, tar_files
    from tests.shard_files import picture, shards_of, write, write_tar

    with tempfile.TemporaryDirectory() as folder:
        out = shards_of(write(Path(folder) / "data", "a/1.png", "b/2.png"), Path(folder) / "out")
        members = {"a__png": picture(0), "a__cls": b"1"}
        write_tar(out / "others" / "000001.tar", **members)
        files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def opened(folder, name):
        where = folder / "others" if name.startswith("others") else folder
        images = open_images(str(where))
        for number in range(len(images)):
            images.load(number)

    def streamed(folder, name):
        with open(folder / name, "rb") as tar, damage_named(folder / name):
            for _, _, stream in tar_files(tar, folder / name):
                stream.read()

    return Kind(
        3, files, list(files), [opened, lambda folder, name: name.endswith("tar") and streamed(folder, name)]
    )


def of_tables() -> Kind:
    import pyarrow as pa

    from dino_sparo.data.arrow import read_footer
    from dino_sparo.data.sources import open_images
    from tests.containers import IMAGE
    from tests.shard_files import picture

    rows = [{"bytes": picture(number), "path": f"{number}.png"} for number in range(2)]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    table = pa.table({"image": pa.array(rows, IMAGE), "label": pa.array([0, 1])})
    about = {"info": {"features": features}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    buffer = BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    files = {
        "saved/data.arrow": buffer.getvalue(),
        "saved/state.json": json.dumps({"_data_files": [{"filename": "data.arrow"}]}).encode(),
        "saved/dataset_info.json": json.dumps(about["info"]).encode(),
        "train.parquet": (OLDER / "data/parquet/train-00000-of-00001.parquet").read_bytes(),
    }

    def saved(folder, name):
        images = open_images(str(folder / "saved"))
        for number in range(len(images)):
            images.load(number)

    def footer(folder, name):
        read_footer(folder / "train.parquet", all_of=["image", "label"])

    return Kind(4, files, list(files), [saved, footer])


def of_weights() -> Kind:
    import torch
    from safetensors.torch import save

    from dino_sparo import load_encoder
    from dino_sparo.evaluation.classifiers import load_classifier, load_official
    from dino_sparo.runs.checkpoint import load_latest

    official = (OLDER / "exported/official.pth").read_bytes()
    buffer = BytesIO()
    torch.save(torch.load(BytesIO(official), weights_only=True), buffer, _use_new_zipfile_serialization=False)
    linear = BytesIO()
    torch.save(
        {"state_dict": {"module.linear.weight": torch.ones(2, 24), "module.linear.bias": torch.ones(2)}},
        linear,
    )
    ours = {"format": 1, "feature": "cls", "num_blocks": 1, "learning_rate": 0.1, "classes": ["a", "b"]}
    ours |= {"encoder": "0" * 64, "details": {}}
    of_probe = save(
        {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, {"dino_sparo_linear": json.dumps(ours)}
    )
    timm = OLDER / "exported" / "timm"
    files = {
        "official.pth": official,
        "older.pth": buffer.getvalue(),
        "timm/model.safetensors": (timm / "model.safetensors").read_bytes(),
        "timm/config.json": (timm / "config.json").read_bytes(),
        "run/checkpoints/step_000000006.pt": next(STUDY.glob("checkpoints/*.pt")).read_bytes(),
        "linear.pth": linear.getvalue(),
        "probe.safetensors": of_probe,
    }
    encoder = load_encoder(OLDER / "exported/official.pth")

    def read(folder, name):
        if name == "linear.pth":
            load_official(folder / name, encoder, classes=("a", "b"), encoder_hash="")
        elif name == "probe.safetensors":
            load_classifier(folder / name)
        else:
            load_encoder(folder / name if name.endswith("pth") else folder / name.partition("/")[0])

    def resumed(folder, name):
        if name.startswith("run"):
            load_latest(folder / "run", unverified=True)

    return Kind(6, files, list(files), [read, resumed])


def of_recipes() -> Kind:
    from dino_sparo.recipe.files import named_recipe
    from dino_sparo.study.variants import read_variants

    files = {path.name: path.read_bytes() for path in (OLDER / "recipes").iterdir()}
    files["variants.yaml"] = (OLDER / "variants.yaml").read_bytes()

    def read(folder, name):
        if name == "variants.yaml":
            read_variants(str(folder / name), [])
        else:
            named_recipe(str(folder / name), {"data.path": "x"})

    return Kind(6, files, list(files), [read])


SLOTS = {  # as the commands about slots write them, of two slots
    "rank": {
        "which": "teacher", "data": "x", "num_select": 4, "num_test": 4, "k": 20,
        "encoders": [{
            "name": "x", "num_parts": 2, "part_dim": 4, "all": {"knn": 9.0, "linear": 8.0},
            "half": {name: {"kept": 1, "knn": 5.0, "linear": 4.0} for name in ("knn", "greedy")},  # former
            "orders": {"knn": [1, 0]}, "alone": {"knn": [1.0, 2.0], "linear": [1.0, 2.0]},
        }],
    },
    "health": {
        "which": "teacher", "data": "x", "num_images": 4,
        "summary": {
            "mean_effective_patches": 2.0, "num_patches": 4, "mean_cls_share": 0.1, "mean_overlap": 0.5,
            "mean_agreement": None,
        },
        "slots": [
            {"slot": slot, "nearest": 1 - slot, "dead": False, "duplicate": True, "entropy": 1.0}
            for slot in (0, 1)
        ],
    },
    "maps": {"which": "teacher", "data": "x", "grid": "grid.png", "slots": [0]},
    "gallery": {"which": "teacher", "data": "x", "slots": [{"slot": 0, "picture": "grid.png"}]},
    "mask": {
        "which": "teacher", "data": "x",
        "rows": [{
            "encoder": "x", "over": "slots", "test_set": "val", "initial": 1.0, "masked": 2.0,
            "relative_change": 3.0, "kept": 1,
        }],
    },
    "factors": {
        "which": "teacher", "num_train": 4, "num_test": 4, "factors": {"hue": 3}, "chance": {"hue": 33.0},
        "encoders": [{"name": "x", "alone": [[40.0], [50.0]], "whole": {"hue": 60.0}}],
    },
}  # fmt: skip


def of_runs() -> Kind:
    from dino_sparo import load_encoder
    from dino_sparo.evaluation.compare import compare_runs, read_run
    from dino_sparo.evaluation.results import save_results
    from dino_sparo.recipe.files import stored_recipe
    from dino_sparo.runs.rundir import check_same_experiment, repair_run_dir
    from dino_sparo.runs.runlog import RunLog
    from dino_sparo.slots.page import write_page
    from dino_sparo.slots.subject import FILES, Subject
    from dino_sparo.study.program import remember_images
    from dino_sparo.study.training import final_knn
    from dino_sparo.training.stopping import BadImages
    from tests.pictures import encoded, photo

    files = {name: (STUDY / name).read_bytes() for name in ("config.yaml", "metrics.jsonl", "starts.jsonl")}
    files["results.json"] = (STUDY / "study/val/results.json").read_bytes()
    files["bad_images.jsonl"] = b'{"name": "a.png", "reason": "odd"}\n' * 3
    files["bad_steps.jsonl"] = b'{"step": 3, "not_finite": "loss"}\n' * 3
    files["images.json"] = (OLDER / "study/images.json").read_bytes()
    files |= {f"slots/{FILES[part]}": json.dumps(content).encode() for part, content in SLOTS.items()}
    files |= dict.fromkeys(("slots/maps/grid.png", "slots/gallery/grid.png"), encoded(photo(), "PNG"))
    recipe = stored_recipe(yaml.safe_load(files["config.yaml"]), "config.yaml")
    encoder = load_encoder(STUDY)

    def page(folder, name):
        subject = Subject(str(folder))
        if name != "metrics.jsonl":  # whose curves take long to draw
            vars(subject)["metrics"] = []
        write_page(folder / "page.html", subject, encoder)

    def compared(folder, name):
        compare_runs([str(folder)])

    def resumed(folder, name):
        check_same_experiment(folder, recipe)

    def mended(folder, name):
        if not name.endswith("jsonl"):
            return
        BadImages(folder, 100)
        repair_run_dir(folder)
        with RunLog(folder, first_step=3, steps_per_epoch=2, total_steps=6):
            final_knn(folder, 3)

    def studied(folder, name):
        remember_images(folder, {}, {})

    def added(folder, name):
        save_results(folder, [*read_run(str(folder)).headline.values()])

    return Kind(1, files, list(files), [page, compared, resumed, mended, studied, added], alike=True)


KINDS = [of_images, of_shards, of_weights, of_recipes, of_runs]
KINDS += [of_tables] if find_spec("pyarrow") else []


# --- Mutations


def mutated(rng: random.Random, name: str, data: bytes) -> bytes:
    """Other content of a file: its values are odd, or its bytes, whose checksums may be right."""
    if name.endswith(("json", "jsonl", "yaml")) and rng.random() < 0.7:
        return odd_values(rng, name, data)
    if data.startswith(b"PK\3\4") and rng.random() < 0.8:
        return of_archive(rng, data)
    if name.endswith("safetensors") and rng.random() < 0.5:
        size = int.from_bytes(data[:8], "little")
        header = odd_values(rng, "json", data[8 : 8 + size])
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    changed = odd_bytes(rng, data)
    return with_checksums(name, changed) if rng.random() < 0.7 else changed


def odd_bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        # Headers, which decide most, are at the beginning.
        at = rng.randrange(min(len(changed), rng.choice([64, 600, 10**9])) or 1)
        size = rng.choice([1, 2, 4, 8, 100])
        match rng.randrange(6):
            case 0 if changed:
                changed[min(at, len(changed) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                number = rng.choice(
                    [0, 1, 2**7, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**32 - 1, rng.randrange(2**32)]
                )
                changed[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)
            case 2:
                changed[at : at + size] = rng.randbytes(size)
            case 3:
                del changed[at : at + size]
            case 4:
                changed[at:at] = changed[at : at + size] * rng.choice([1, 2, 500])
            case 5 if rng.random() < 0.2:
                del changed[rng.randrange(len(changed) + 1) :]
    return bytes(changed)


def odd_values(rng: random.Random, name: str, data: bytes) -> bytes:
    """JSON, JSON lines or YAML with values of other kinds, or without some."""
    if name.endswith("yaml"):
        return yaml.safe_dump(with_odd(rng, yaml.safe_load(data)), allow_unicode=True).encode(
            "utf-8", "replace"
        )
    lines = data.splitlines() if name.endswith("jsonl") else [data]
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(with_odd(rng, json.loads(lines[at]))).encode()
    return b"\n".join(lines) + b"\n"


def with_odd(rng: random.Random, value: object) -> object:
    """A value in which one, at any depth, is odd or left out."""
    inside = isinstance(value, dict | list) and value and rng.random() < 0.9
    if not inside:
        return rng.choice(ODD)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    if rng.random() < 0.1:
        del value[key]
    else:
        value[key] = with_odd(rng, value[key])
    return value


def of_archive(rng: random.Random, data: bytes) -> bytes:
    """A zip archive with a member of odd bytes."""
    buffer = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        names = old.namelist()
        chosen = rng.choice([name for name in names if name.endswith("data.pkl")] + names)
        for name in names:
            new.writestr(name, odd_bytes(rng, old.read(name)) if name == chosen else old.read(name))
    return buffer.getvalue()


def with_checksums(name: str, data: bytes) -> bytes:
    """The same content with the checksums of a PNG, tar, or index right."""
    changed = bytearray(data)
    if data.startswith(b"\x89PNG"):
        at = 8
        while at + 12 <= len(data):
            end = at + 8 + int.from_bytes(data[at : at + 4], "big")
            changed[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
            at = end + 4
        return bytes(changed[: len(data)])
    if name.endswith("index"):
        at = data.find(b"\n") + 1
        changed[at : at + 4] = struct.pack("<I", zlib.crc32(data[at + 4 :]))
    if name.endswith("tar"):
        for at in range(0, len(data) - 511, 512):
            if data[at + 257 : at + 262] == b"ustar":
                total = sum(data[at : at + 512]) - sum(data[at + 148 : at + 156]) + 8 * 32
                changed[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(changed)


# --- In a process of its own


class Cost(NamedTuple):
    """Of reading: seconds of this process, and megabytes beyond those that it had before."""

    seconds: float
    megabytes: float


def read_all(kind: Kind, folder: Path, name: str, *, good: bool = False) -> tuple[Cost, str]:
    """What readers take together, and what is wrong with that; of good files also an error of ours."""
    from dino_sparo.errors import UserError

    wrong = ""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = memory("VmRSS"), time.process_time()
    for read in kind.readers:
        try:
            read(folder, name)
        except UserError as error:
            if good:
                wrong = repr(error)
        except Exception as error:
            import traceback

            where = traceback.extract_tb(error.__traceback__)
            ours = [
                f"{Path(one.filename).name}:{one.lineno}" for one in where if "dino_sparo" in one.filename
            ]
            wrong = f"{error!r:.300} at {' '.join(ours[-4:])}"
    return Cost(time.process_time() - began, memory("VmHWM") - before), wrong


def memory(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def put(folder: Path, name: str, data: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    os.utime(folder / name, ns=(10**18, 10**18))  # the index of shards knows it


def main(seed: int, first: int, last: int) -> None:
    import logging
    import warnings

    logging.disable()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        os.environ["DINO_SPARO_CACHE"] = f"{place}/cache"
        with redirect_stdout(sys.stderr):
            kinds, folders, bounds = [make() for make in KINDS], [], []
        for number, kind in enumerate(kinds):
            folder = Path(place) / str(number)
            folders.append(folder)
            for name, data in kind.files.items():
                put(folder, name, data)
            names, costs = ["metrics.jsonl"] if kind.alike else kind.changed, []
            for name in [*names, *names]:  # first what is imported and made once
                cost, wrong = read_all(kind, folder, name, good=True)
                assert not wrong, f"the good {name}: {wrong}"
                costs.append(cost)
                restore(kind, folder)
            most = [max(of) for of in zip(*costs[len(names) :], strict=True)]
            bounds.append(Cost(max(LEAST_SECONDS, TIMES * most[0]), max(LEAST_MB, TIMES * most[1])))
            print(KINDS[number].__name__, "good:", most, file=sys.stderr)
        for number in range(first, last):
            print(number, flush=True)
            rng = random.Random(f"{seed} {number}")
            (at,) = rng.choices(range(len(kinds)), [kind.share for kind in kinds])
            kind, folder = kinds[at], folders[at]
            name = rng.choice(kind.changed)
            put(folder, name, mutated(rng, name, kind.files[name]))
            cost, wrong = read_all(kind, folder, name)
            if not wrong and (cost.seconds > bounds[at].seconds or cost.megabytes > bounds[at].megabytes):
                cost, wrong = read_all(kind, folder, name)  # once more: others use the machine too
                if cost.seconds > bounds[at].seconds or cost.megabytes > bounds[at].megabytes:
                    wrong = f"takes {cost}, where {bounds[at]} is allowed"
            if wrong:
                print(f"{number} {KINDS[at].__name__} {name}: {wrong}", flush=True)
            restore(kind, folder)


def restore(kind: Kind, folder: Path) -> None:
    """The good files again, and nothing else where readers write."""
    for path in folder.rglob("*"):
        if path.is_file() and str(path.relative_to(folder)) not in kind.files:
            path.unlink()
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    for name, data in kind.files.items():
        if (
            not (folder / name).is_file()
            or (folder / name).stat().st_mtime_ns != 10**18
            or (folder / name).read_bytes() != data
        ):
            put(folder, name, data)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
