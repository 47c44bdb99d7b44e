"""The result of `dino-sparo bench` as text."""

from typing import Any


def report(result: dict[str, Any]) -> str:
    """The result of `training.measure` as lines of text."""
    lines = [
        "{recipe}, batch {batch_size}, {precision}, {device}, {threads} threads, {num_workers} workers, "
        "{cores} cores, torch {torch}".format(**result),
        f"{result['data']}; read from the page cache; {result['rounds']} rounds",
        "",
        f"{'stage alone':<24}{'median ms':>11}{'10 %':>10}{'90 %':>10}{'images/s':>11}",
    ]
    for name, found in result["stages"].items():
        of_image = name in ("read", "decode", "draw views", "views by PIL")  # the others are for a batch
        lines.append(_row(f"{name}, one core" if of_image else name, found))
    lines += ["", f"host waits for the device per step: {_listed(result['host_waits_per_step'])}"]
    peaks = [f"{peak / 1e12:.2f} TFLOP/s {name}" for name, peak in result["peak_flops"].items() if peak]
    lines.append(
        f"{result['flops_per_image'] / 1e9:.2f} GFLOP per image; peak of matrix products: {', '.join(peaks)}"
    )
    for what, shares in result["utilization"].items():
        of_peaks = ", ".join(f"{100 * share:.1f} % of the {name} peak" for name, share in shares.items())
        lines.append(f"model FLOP utilization, {what.replace('_', ' ')}: {of_peaks}")
    for who, memory in result["memory"].items():
        peak = memory["peak_bytes"]
        of_gpu = "" if peak is None else f"peak GPU memory {peak / 2**30:.2f} GiB, "
        lines.append(f"{who}: {of_gpu}{memory['saved_bytes'] / 2**20:.1f} MiB saved for backward")
    if result["end_to_end"] is not None:
        lines.append(_end_to_end(result["end_to_end"]))
    if result["compare"] is not None:
        lines += _compared(result["compare"], result["rounds"])
    if result["profile"] is not None:
        profile = result["profile"]
        lines += ["", f"trace of {profile['steps']} steps with their loading: {profile['trace']}"]
        lines.append(f"host waits per step with loading: {_listed(profile['host_waits_per_step'])}")
    return "\n".join(lines)


def _compared(compared: dict[str, Any], rounds: int) -> list[str]:
    ratio = "{median:.2f} ({p10:.2f} to {p90:.2f})".format(**compared["step"])
    lines = ["", _row("plain: whole step", compared["plain_step"])]
    lines.append(f"plain / ours, whole step: {ratio}, {rounds} interleaved rounds")
    for name, of_memory in compared["memory"].items():
        what = {"peak_bytes": "peak GPU memory", "saved_bytes": "bytes saved for backward"}[name]
        lines.append(f"plain / ours, {what}: {of_memory:.2f}")
    if compared["end_to_end"] is not None:
        lines.append(_end_to_end(compared["plain_end_to_end"], ", plain code and views"))
        lines.append(f"ours / plain, end to end: {compared['end_to_end']:.2f}")
    return lines


def _row(name: str, found: dict[str, float]) -> str:
    numbers = "{median_ms:>11.2f}{p10_ms:>10.2f}{p90_ms:>10.2f}{images_per_second:>11.1f}"
    return f"{name:<24}{numbers.format(**found)}"


def _end_to_end(found: dict[str, float], who: str = "") -> str:
    return (
        f"end to end{who}: {found['images_per_second']:.1f} images/s, {100 * found['data_wait_share']:.1f} % "
        f"of the time waiting for data ({found['steps']} steps in {found['seconds']:.1f} s)"
    )


def _listed(waits: dict[str, float]) -> str:
    return ", ".join(f"{name} {count:g}" for name, count in waits.items() if count) or "none"
