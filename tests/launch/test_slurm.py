"""launch/train.sbatch: on a real cluster (`pytest -m matrix`), and its decision to requeue, on one of shell scripts."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.launch.helpers import (
    LAUNCH,
    ROOT,
    TRAIN,
    assert_every_epoch_once,
    assert_trained,
    environment,
    free_port,
    wait_for_epochs,
    write_program,
)

SCRIPT = LAUNCH / "train.sbatch"
# Stand-ins: srun runs its program once, as task 0 would be; scontrol and accelerate write down what they are asked for.
SRUN = """while [ "${1#--}" != "$1" ]; do shift; done; SLURM_NODEID=0 SLURMD_NODENAME=node1 "$@" """
SCONTROL = """if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "$*" >> "$SEEN/scontrol"; fi"""
ACCELERATE = """printf '%s\\n' "$@" > "$SEEN/accelerate"; env > "$SEEN/environment"; eval "$TRAINING" """


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    """A folder with the stand-ins in bin/, and what they saw."""
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL), ("accelerate", ACCELERATE)):
        write_program(tmp_path / "bin" / name, script)
    return tmp_path


def run_script(seen: Path, training: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The job on two nodes of eight GPUs; `training` is what happens instead of training, as shell."""
    job = {"SLURM_JOB_ID": "417", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    job |= {"SLURM_GPUS_ON_NODE": "8", "RUN": str(seen / "run"), "SEEN": str(seen), "TRAINING": training, **variables}
    env = environment(**job)
    env["PATH"] = f"{seen / 'bin'}{os.pathsep}{env['PATH']}"
    (seen / "run").mkdir(exist_ok=True)
    return subprocess.run(["bash", SCRIPT, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def says(status: str, code: int) -> str:
    facts = json.dumps({"status": status, "exit_code": code})
    return f"echo '{facts}' > $RUN/run.json"


def requeued(seen: Path) -> list[str]:
    return (seen / "scontrol").read_text().splitlines() if (seen / "scontrol").exists() else []


def test_requeues_once_after_preempted(seen: Path) -> None:
    done = run_script(seen, f"{says('preempted', 75)}; exit 1", "photos")
    assert (done.returncode, requeued(seen)) == (0, ["requeue 417"])


@pytest.mark.parametrize(
    ("training", "code"),
    [
        (says("done", 0), 0),
        (f"{says('failed', 3)}; exit 1", 3),
        ("exit 1", 1),
    ],
)
def test_does_not_requeue_after_other_exit_codes(training: str, code: int, seen: Path) -> None:
    assert run_script(seen, training, "photos").returncode == code
    assert requeued(seen) == []


def test_preempted_of_an_earlier_attempt_does_not_requeue(seen: Path) -> None:
    run_script(seen, f"{says('preempted', 75)}; exit 1", "photos")
    assert run_script(seen, "exit 1", "photos").returncode == 1
    assert requeued(seen) == ["requeue 417"]


@pytest.mark.parametrize(("before", "again"), [("1", True), ("2", False), ("3", False)])
def test_requeues_up_to_the_limit(before: str, again: bool, seen: Path) -> None:
    preempted = f"{says('preempted', 75)}; exit 1"
    done = run_script(seen, preempted, "photos", SLURM_RESTART_COUNT=before, MAX_REQUEUES="2")
    assert (requeued(seen) == ["requeue 417"]) is again
    assert done.returncode == (0 if again else 75)


@pytest.mark.parametrize("job", ["", "417; touch evil", "$(touch evil)", "417_1"])
def test_invalid_job_id_is_refused(job: str, seen: Path) -> None:
    assert run_script(seen, says("done", 0), "photos", SLURM_JOB_ID=job, SEEN=str(seen)).returncode == 2
    assert not (seen / "accelerate").exists() and not list(ROOT.glob("evil"))


def test_arguments_reach_training_unchanged(seen: Path) -> None:
    """None is read as shell, whatever characters it has."""
    awkward = ["my photos", "--name", "$(touch evil); `touch evil` \"'*"]
    assert run_script(seen, says("done", 0), *awkward).returncode == 0
    words = (seen / "accelerate").read_text().splitlines()
    start = words.index("resnet_dist")
    assert words[start : start + 5] == ["resnet_dist", "train", *awkward]
    assert words[words.index("--num_processes") + 1] == "16" and words[words.index("--num_machines") + 1] == "2"
    assert not list(ROOT.glob("evil")), "a shell read an argument"


def test_restarts_have_the_settings_that_they_need(seen: Path) -> None:
    """See the test of this name in test_configs.py; and USR1 is for the processes, it must not end the launcher."""
    run_script(seen, says("done", 0), "photos")
    words, variables = ((seen / name).read_text().splitlines() for name in ("accelerate", "environment"))
    assert words[words.index("--rdzv_backend") + 1] == "c10d" and "--max_restarts" in words
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in variables
    assert any(line.startswith("PET_SIGNALS_TO_HANDLE=") and "SIGUSR1" in line for line in variables)


def test_one_process_runs_without_launcher(seen: Path) -> None:
    write_program(seen / "bin" / "python", 'case "$1" in -m) echo "$*" > "$SEEN/python";; *) exec python3 "$@";; esac')
    run_script(seen, "exit 1", "photos", SLURM_JOB_NUM_NODES="1", SLURM_GPUS_ON_NODE="1")
    assert (seen / "python").read_text() == f"-m resnet_dist train photos -o {seen}/run --resume auto\n"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which a SLURM cluster of two nodes with two GPUs each answers."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    reason = f"needs Debian's slurm-wlm and munge; missing: {missing}" if missing else ""
    if not reason and os.geteuid() != 0:
        reason = "needs root, to start a cluster"
    if not reason and torch.cuda.is_available():
        reason = "needs a machine without GPUs, as the cluster's are none"
    if reason and os.environ.get("RESNET_DIST_CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    folder, program = tmp_path_factory.mktemp("slurm"), Path(__file__).parent / "slurm_cluster.sh"
    subprocess.run(["bash", program, "start", folder, str(free_port())], check=True, timeout=60)
    yield environment(SLURM_CONF=str(folder / "slurm.conf"))
    subprocess.run(["bash", program, "stop", folder], check=True)


def submit(cluster: dict[str, str], log: Path, options: list[str], *arguments: str, **variables: str) -> str:
    """Hand the job in. Returns its number."""
    forced = ["--parsable", "--cpus-per-task=1", f"--output={log}", *options]
    return slurm({**cluster, "PRECISION": "no", **variables}, "sbatch", *forced, str(SCRIPT), *arguments).strip()


def slurm(env: dict[str, str], *command: str) -> str:
    return subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout


def wait_for(cluster: dict[str, str], job: str, words: str, log: Path) -> None:
    """Until the job's description has these words."""
    end = time.monotonic() + 120
    while words not in (state := slurm(cluster, "scontrol", "show", "job", job)):
        if time.monotonic() > end or "JobState=FAILED" in state:
            pytest.fail(f"the job never came to {words}:\n{state}\n{log.read_text() if log.exists() else ''}")
        time.sleep(0.2)


@pytest.mark.matrix
@pytest.mark.parametrize(("nodes", "gpus"), [(2, 1), (1, 2)])
def test_trains_on_a_cluster(nodes: int, gpus: int, cluster: dict[str, str], photos: Path, tmp_path: Path) -> None:
    """Two launchers of one process, and one launcher of two."""
    log, run = tmp_path / "log", tmp_path / "run"
    job = submit(cluster, log, [f"--nodes={nodes}", f"--gpus-per-node={gpus}"], str(photos), *TRAIN, RUN=str(run))
    wait_for(cluster, job, "JobState=COMPLETED", log)
    assert_trained(run, log.read_text(), processes=nodes * gpus)


@pytest.mark.matrix
def test_job_continues_after_its_time_limit(cluster: dict[str, str], photos: Path, tmp_path: Path) -> None:
    """USR1, as SLURM sends it before the end: all save, the job is requeued and goes on, every epoch once, in order."""
    log, run = tmp_path / "log", tmp_path / "run"
    options = ["--nodes=2", "--gpus-per-node=1"]
    job = submit(cluster, log, options, str(photos), *TRAIN, "--epochs", "15", RUN=str(run))
    wait_for_epochs(run, 3)
    slurm(cluster, "scancel", "--signal=USR1", job)
    wait_for(cluster, job, "Restarts=1", log)
    assert json.loads((run / "run.json").read_text())["status"] == "preempted"
    # Or SLURM lets it wait for two minutes; in the second of the requeue itself, its nodes refuse the job.
    slurm(cluster, "scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")
    wait_for(cluster, job, "JobState=COMPLETED", log)
    assert "requeue 1 of 20" in log.read_text()
    assert_every_epoch_once(run, 15)
