"""A run folder as training, evaluations and the commands about slots leave it, with made-up numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino_sparo.evaluation.results import Result, save_results

FACTORS = {"shape": 4, "colour": 6, "x": 5, "y": 5, "size": 3, "rotation": 4}
WAYS = ("knn", "linear", "greedy")


def write_run(folder: Path, num_slots: int = 16, picture_side: int = 40, name: str = "run") -> None:
    """Everything that the report can show. Pictures are noise, so that they do not compress.

    name: is part of the names of images, encoders and data.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    _write_training(folder, rng)
    settings = [
        ("knn", "20-NN", True, 44.56),
        ("knn", "10-NN", False, 42.81),
        ("linear", "4 blocks both", True, 51.97),
    ]
    save_results(folder, [_result(*setting, name) for setting in settings])
    parts = {
        "rank": _rank(rng, num_slots, name),
        "health": _health(rng, num_slots),
        "mask": _mask(num_slots, name),
        "factors": _factors(rng, num_slots, name),
        "maps": _maps(num_slots, name),
        "gallery": _gallery(num_slots, name),
    }
    slots = folder / "slots"
    for part, content in parts.items():
        (slots / part).mkdir(parents=True)
        about = {} if part == "factors" else {"data": f"{name}/photos"}
        (slots / part / f"{part}.json").write_text(json.dumps(about | content))
    pictures = [slots / "maps" / "grid.png", slots / "mask" / "mask.png"]
    pictures += [slots / "maps" / file for of in parts["maps"]["overlays"].values() for file in of.values()]
    pictures += [slots / "gallery" / entry["picture"] for entry in parts["gallery"]["slots"]]
    noise = rng.integers(0, 256, (picture_side, picture_side, 3), dtype=np.uint8)
    for path in pictures:
        Image.fromarray(np.roll(noise, len(path.name), axis=1)).save(path, compress_level=1)


def _write_training(folder: Path, rng: np.random.Generator) -> None:
    entries: list[dict[str, Any]] = []
    for step in range(0, 101, 10):
        at = {"step": step, "epoch": step / 10}
        if step % 50 == 0:
            entries.append(at | {"knn20_top1": 30 + step / 7, "knn20_top5": 80.0})
        values = {"loss": 6 - step / 50, "entropy_teacher": 4.5, "entropy_mean": 5.5, "feature_std": 0.7}
        slot = {"slot_entropy": 3 - step / 200, "slot_cls_share": float(rng.random()) / 10}
        entries.append(at | values | slot)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    start = {"time": "2025-01-02T03:04:05+00:00", "python": "3.11.7", "git": "0123abc", "processes": 1}
    start |= {"command": ["dino-sparo", "pretrain", "--config", "photos_sparo", "--run_dir", "x"]}
    start |= {"versions": {"dino-sparo": "0.1.0", "torch": "2.11.0"}, "device": "cpu", "precision": "fp32"}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    (folder / "config.yaml").write_text("seed: 0\ndata:\n  path: shapes\n")


def _result(protocol: str, setting: str, headline: bool, top1: float, name: str) -> Result:
    about = {"protocol": protocol, "name": setting, "headline": headline, "test_set": name}
    numbers = {"top1": top1, "top5": 91.03, "num_images": 8, "num_classes": 2}
    correct = np.zeros(8, bool)
    return Result(**about, **numbers, weights="teacher", details={}, correct=correct, images="0")


def _rank(rng: np.random.Generator, num_slots: int, name: str) -> dict[str, Any]:
    encoders = []
    for number, encoder in enumerate((f"sparo {name}", f"cls {name}")):
        alone = {way: (20 + 30 * rng.random(num_slots)).tolist() for way in WAYS[:2]}
        orders = {way: np.argsort(-np.array(scores)).tolist() for way, scores in alone.items()}
        orders["greedy"] = orders["linear"][::-1]
        kept = sorted({1, 2, num_slots // 2, num_slots})
        points = [{"kept": n, "knn": 60 - 30 / n - number, "linear": 70 - 30 / n - number} for n in kept]
        half = {"kept": num_slots // 2, "knn": 55.123 - number, "linear": 65.4}
        entry = {"name": encoder, "run": encoder, "num_parts": num_slots, "part_dim": 32, "alone": alone}
        entry |= {"orders": orders, "curve": dict.fromkeys(WAYS, points), "half": dict.fromkeys(WAYS, half)}
        encoders.append(entry | {"all": {"knn": 58.25, "linear": 68.75}})
    return {"k": 20, "num_select": 800, "num_fit": 3200, "num_test": 1000, "encoders": encoders}


def _health(rng: np.random.Generator, num_slots: int) -> dict[str, Any]:
    keys = ("entropy", "effective_patches", "cls_share", "response_std", "overlap")
    slots = [
        {"slot": slot, "dead": slot == 3, "nearest": (slot + 1) % num_slots, "agreement": None}
        | {key: float(rng.random()) for key in keys}
        for slot in range(num_slots)
    ]
    summary = {"mean entropy": 2.515, "dead slots": 1, "agreement": None}
    return {"num_images": 1000, "slots": slots, "summary": summary}


def _mask(num_slots: int, name: str) -> dict[str, Any]:
    numbers = {"initial": 44.51, "masked": 47.29, "relative_change": 6.25, "kept": 0.62}
    rows = [
        {"encoder": f"{encoder} {name}", "run": encoder, "over": over, "test_set": test_set} | numbers
        for encoder in ("sparo", "cls")
        for over in ("slots", "dimensions")
        for test_set in ("val", "second")
    ]
    return {"transfer": None, "rows": rows, "masks": {"sparo slots": [0.5] * num_slots}}


def _factors(rng: np.random.Generator, num_slots: int, name: str) -> dict[str, Any]:
    chance = {factor: 100 / values for factor, values in FACTORS.items()}
    alone = [[chance[f] + (100 - chance[f]) * float(rng.random()) for f in FACTORS] for _ in range(num_slots)]
    encoders = [
        {"name": f"{run} {name}", "run": run, "alone": scores, "whole": dict.fromkeys(FACTORS, 97.53)}
        for run, scores in (("sparo", alone), ("cls", []))
    ]
    return {"factors": FACTORS, "chance": chance, "encoders": encoders, "num_train": 2000, "num_test": 1000}


def _maps(num_slots: int, name: str) -> dict[str, Any]:
    numbers, drawn = range(0, 80, 10), list(range(num_slots))
    overlays = {
        str(n): {"cls": f"image{n}_cls.png"} | {str(slot): f"image{n}_slot{slot:02d}.png" for slot in drawn}
        for n in numbers
    }
    images = [f"train/{name}/{n}.jpg" for n in numbers]
    head = {"run": name, "which": "teacher", "images": images}
    return head | {"slots": drawn, "grid": "grid.png", "overlays": overlays}


def _gallery(num_slots: int, name: str) -> dict[str, Any]:
    top = [{"image": f"train/{name}/0.jpg", "response": 3.0, "neighbours": []}]
    slots = [{"slot": slot, "picture": f"slot{slot:02d}.png", "top": top} for slot in range(num_slots)]
    return {"run": name, "slots": slots}
