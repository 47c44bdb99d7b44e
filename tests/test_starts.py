"""Programs that were started by something else: what the environment says about processes, ports, outputs."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino_sparo.__main__ import main
from dino_sparo.data.workers import WatchedLoader
from dino_sparo.errors import UserError, errors_for_user
from dino_sparo.parallel import distributed
from dino_sparo.parallel.processes import COPIES, NUMBERS, check_environment
from tests.running import command, family, finished, wait_for_step
from tests.tiny import tiny_arguments, write_pictures

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def set_environment(monkeypatch, values: dict[str, str]) -> None:
    """These variables about processes, and no others."""
    for name in (*NUMBERS, "MASTER_ADDR", *(name for names in COPIES.values() for name in names)):
        monkeypatch.setenv(name, "")  # so that it is put back, even if the program takes it away
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        dict.fromkeys(WHOLE, ""),
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "pod", "MASTER_PORT": "1"},  # one pod of Kubeflow
        {"MASTER_ADDR": "somewhere"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "WORLD_SIZE": "1"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", **WHOLE},  # torchrun on each of two machines
        WHOLE,
    ],
)
def test_environments_that_tell_their_processes_are_taken(values, monkeypatch):
    set_environment(monkeypatch, values)
    check_environment()
    assert all(os.environ.get(name) != "" for name in WHOLE)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but there is no RANK and no MASTER_ADDR and no MASTER_PORT"),
        (WHOLE | {"MASTER_ADDR": " "}, "WORLD_SIZE is 2, but there is no MASTER_ADDR"),
        (WHOLE | {"RANK": "two"}, "RANK is 'two', expected a number"),
        (WHOLE | {"RANK": "-1"}, "RANK is '-1', expected a number"),
        (WHOLE | {"LOCAL_RANK": "1.0"}, r"LOCAL_RANK is '1\.0', expected a number"),
        (WHOLE | {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999, expected at most 65535"),
        (WHOLE | {"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "3"}, "RANK is 3, but there is no WORLD_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"}, "srun has started this program 8 times"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun has started this program 4 times"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "mpiexec has started this program 4 times"),
        ({"FLUX_JOB_SIZE": "3", "FLUX_TASK_RANK": "0"}, "flux run has started this program 3 times"),
    ],
)
def test_environments_that_do_not_are_refused_by_name_before_anything_is_done(
    values, said, monkeypatch, capsys, tmp_path
):
    set_environment(monkeypatch, values)
    with pytest.raises(UserError, match=said):
        check_environment()
    set_environment(monkeypatch, values)
    assert main(["pretrain", *tiny_arguments(tmp_path, tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("error: ") == 1 and not (tmp_path / "run").exists()


def test_of_tasks_that_would_do_the_same_work_one_speaks(monkeypatch, capsys):
    set_environment(monkeypatch, {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"})
    assert main(["knn", "run", "--data.path", "data"]) == 2
    assert capsys.readouterr().err == ""


def test_one_process_of_a_cluster_may_start_more_on_its_machine(monkeypatch, tmp_path):
    set_environment(monkeypatch, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "pod", "MASTER_PORT": "1"})
    monkeypatch.setattr("dino_sparo.parallel.launch.launch", lambda number, arguments: number)
    assert main(["pretrain", *tiny_arguments(tmp_path, tmp_path / "run"), "--nproc", "8"]) == 8


@pytest.mark.parametrize(
    ("rank", "who"), [("0", "process 1"), ("1", r"process 0 at localhost, port \d+ \(Connection refused\)")]
)
def test_who_waits_says_for_whom_and_gives_up_in_time(rank, who, monkeypatch, caplog):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    set_environment(monkeypatch, WHOLE | {"RANK": rank, "MASTER_PORT": str(port)})
    monkeypatch.setattr(distributed, "SAY_SECONDS", 0.2)
    monkeypatch.setattr(distributed, "PATIENCE", distributed.PATIENCE / 1800)
    with (
        pytest.raises(UserError, match=f"process {rank} of 2 has waited 1 s for {who}; "),
        distributed.process_group(torch.device("cpu")),
    ):
        pass
    assert f"process {rank} of 2 has waited 0 s for process {1 - int(rank)}" in caplog.text


def test_an_address_that_does_not_exist_is_named(monkeypatch):
    set_environment(monkeypatch, WHOLE | {"RANK": "0", "MASTER_ADDR": "nowhere.invalid"})
    with (
        pytest.raises(UserError, match=r"cannot use MASTER_ADDR 'nowhere\.invalid', MASTER_PORT 29500"),
        distributed.process_group(torch.device("cpu")),
    ):
        pass


# --- Ports


def listening(pid: int) -> set[str]:
    """Addresses, in hexadecimal, at which a process or those that it has started listen."""
    addresses = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                addresses[f"socket:[{fields[9]}]"] = fields[1].partition(":")[0]
    found = set()
    for member in family(pid):
        for descriptor in Path(f"/proc/{member}/fd").iterdir():
            found |= {addresses.get(os.readlink(descriptor), "")} if descriptor.is_symlink() else set()
    return found - {""}


@pytest.mark.long
@pytest.mark.parametrize(("processes", "addresses"), [(1, set()), (2, {"0100007F"})])  # 127.0.0.1
def test_no_port_is_open_to_other_machines(processes, addresses, tmp_path):
    write_pictures(tmp_path / "data", 12)
    changes = {"optim__epochs": 1000, "machine__num_workers": 1}
    arguments = command(tmp_path / "data", tmp_path / "run", processes, **changes)
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
        wait_for_step(2, tmp_path / "run", process)
        found = listening(process.pid)
        process.kill()
    assert found <= addresses


# --- Outputs


def in_python(code: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A program that a shell starts with streams closed."""
    code = f"import os, sys; from dino_sparo.terminal import open_outputs; open_outputs(); {code}"
    shell = f'exec "$0" -c "$1" {redirect}'
    arguments = ["bash", "-c", shell, sys.executable, code]
    return finished(arguments, env=os.environ | environment)


UNREAD = {"full disk": "2>/dev/full", "ended reader": "2> >(:)", "sleeping reader": "2> >(sleep 1)"}


@pytest.mark.parametrize("unread", UNREAD.values(), ids=UNREAD)
def test_what_standard_error_cannot_write_is_dropped(unread):
    code = "os.set_blocking(2, False); [print('x' * 99999, file=sys.stderr) for _ in '12']; print('out')"
    done = in_python(code, unread)
    assert done.returncode == 0 and done.stdout == "out\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_stand_for_nothing_and_no_file_takes_their_numbers(closed, tmp_path):
    code = f"print('out'); print('err', file=sys.stderr); file = open('{tmp_path / 'x'}', 'w')"
    done = in_python(f"{code}; file.write(str(file.fileno()))", closed)
    assert done.returncode == 0 and int((tmp_path / "x").read_text()) > 2
    assert done.stdout == ("" if " >&-" in f" {closed}" else "out\n")


@pytest.mark.parametrize("arguments", [["--version"], ["knn", "--help"]])
def test_commands_end_well_without_an_output(arguments):
    done = finished(["bash", "-c", 'exec "$0" -m dino_sparo "$@" >&-', sys.executable, *arguments])
    assert done.returncode == 0 and done.stderr == ""


def test_characters_that_an_output_does_not_have_are_escaped():
    done = in_python("print('caf\u00e9')", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout == "caf\\xe9\n"


def test_shared_memory_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != "/dev/shm")
    with pytest.raises(UserError, match="/dev/shm is not writable, but"):
        WatchedLoader([], image_of=int, name=str, num_workers=1, timeout_seconds=1)
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda tensor: pytest.fail("/dev/shm is written"))
    WatchedLoader([], image_of=int, name=str, num_workers=0, timeout_seconds=1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_also_where_no_file_is_named(code):
    with pytest.raises(UserError, match=r"a file cannot be read or written \("), errors_for_user():
        raise OSError(code, os.strerror(code))
    with pytest.raises(OSError, match="of the network"), errors_for_user():
        raise OSError(errno.ECONNRESET, "of the network")


# --- Evaluations where nothing can be written


def evaluate(run_dir: Path, folder: Path, *more: str) -> int:
    """k-NN on pictures that are drawn into a folder."""
    write_pictures(folder / "data", 10, classes=2)
    data = ["--data.path", str(folder / "data"), "--num_workers", "0"]
    return main(["knn", str(run_dir), *data, "--k", "1", *more])


def test_a_run_folder_whose_name_tensorboard_cannot_write_is_refused_at_once(tmp_path, capsys):
    write_pictures(tmp_path / "data", 4)
    run_dir = tmp_path / os.fsdecode(b"r\xff")
    assert main(["pretrain", *tiny_arguments(tmp_path / "data", run_dir)]) == 2
    assert r"r\udcff is not a name in UTF-8" in capsys.readouterr().err and not run_dir.exists()


def test_a_run_folder_that_cannot_be_written_is_refused_at_once(run_dir, tmp_path, monkeypatch, capsys):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != run_dir and access(path, mode))
    monkeypatch.setattr("dino_sparo.interop.load.load_encoder", None)  # not called
    assert evaluate(run_dir, tmp_path) == 2
    assert f"{run_dir} cannot be written, so results cannot be saved there; give" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda path, mode: path != run_dir and access(path, mode))
    assert evaluate(run_dir, tmp_path, "--out", str(tmp_path / "out")) == 0
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {"features", "results.json"}


def test_numbers_are_printed_before_they_are_saved(run_dir, tmp_path, monkeypatch, capsys):
    def full(folder, results):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "results.json"))

    monkeypatch.setattr("dino_sparo.evaluation.results.save_results", full)
    assert evaluate(run_dir, tmp_path) == 2
    told = capsys.readouterr()
    assert "top-1" in told.out
    assert "results.json cannot be written (No space left on device), so the results above" in told.err
    assert "give another folder with --out" in told.err
