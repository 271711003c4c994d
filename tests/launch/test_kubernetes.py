"""The Kubernetes manifests: valid, consistent, and their commands train with the environment that they would get."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from tests.launch.helpers import LAUNCH, TRAIN, Command, assert_trained, environment, finish, free_port, write_program

SERVICE, JOB = yaml.safe_load_all((LAUNCH / "kubernetes-job.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
SHORTEST = ["--epochs", "2"]  # for the recipe in the manifests
TRAIN_JOB = yaml.safe_load((LAUNCH / "kubeflow-trainjob.yaml").read_text())


@pytest.mark.parametrize("version", ["1.31", "1.37"])  # podFailurePolicy is stable since 1.31
@pytest.mark.parametrize("manifest", [SERVICE, JOB], ids=["Service", "Job"])
def test_manifest_is_valid(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_train_job_is_valid() -> None:
    """By Kubeflow's own models: a key they do not know would be missing from what they give back."""
    understood = TrainerV1alpha1TrainJob.from_dict(TRAIN_JOB)
    assert understood is not None and understood.to_dict() == TRAIN_JOB


def test_pods_find_each_other() -> None:
    spec, environment = JOB["spec"], values()
    assert SERVICE["spec"]["clusterIP"] == "None", "headless"
    assert SERVICE["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]}, "the label that the Job's pods get"
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    assert environment["MAIN_HOST"] == f"{JOB['metadata']['name']}-0.{SERVICE['metadata']['name']}"
    assert spec["completions"] == spec["parallelism"] == int(environment["NODES"])
    gpus = CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    assert int(environment["PROCESSES"]) == spec["completions"] * gpus


def test_mounts_exist_and_grace_period_allows_saving() -> None:
    volumes = {volume["name"] for volume in POD["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == volumes
    assert int(values()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < POD["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(
    ("code", "action"),
    [(75, "Ignore"), (1, "Count"), (2, "FailJob"), (3, "FailJob"), (4, "Count"), (137, "Count")],
)
def test_exit_codes_decide_about_retries(code: int, action: str) -> None:
    """Preempted is no failure, a broken machine is worth another try, wrong data is not."""
    assert POD["restartPolicy"] == "Never", "without it the policy is refused"
    assert JOB["spec"]["completionMode"] == "Indexed"
    for rule in JOB["spec"]["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule and code in rule["onExitCodes"]["values"]:
            assert (rule["onExitCodes"]["operator"], rule["onExitCodes"]["containerName"]) == ("In", CONTAINER["name"])
            assert rule["action"] == action
            return
    assert action == "Count"


@pytest.mark.parametrize("index", [0, 1])
def test_job_command(index: int, tmp_path: Path) -> None:
    """Which pod it is reaches the launcher, the arguments reach training, and a preempted run is not a failure."""
    preempted = """printf '%s\\n' "$@" > $RUN/seen; echo '{"status": "preempted"}' > $RUN/run.json; exit 1"""
    write_program(tmp_path / "bin" / "accelerate", preempted)
    pod = job_command(tmp_path, index, {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{environment()['PATH']}"})
    with pod.start() as process:
        assert process.wait(60) == 75
    seen = (tmp_path / "seen").read_text().splitlines()
    assert seen[seen.index("--machine_rank") + 1] == str(index)
    assert seen[seen.index("--rdzv_conf") + 1].startswith(f"is_host={1 - index},"), "pod 0 keeps the rendezvous"
    training = ["-m", "resnet_dist", "train", *CONTAINER["args"], "-o", str(tmp_path), "--resume", "auto"]
    assert seen[seen.index("-m") :] == training


@pytest.mark.matrix
def test_job_trains(photos: Path, tmp_path: Path) -> None:
    """The container's command as two pods would run it, here on one network, each with one process."""
    places = {"29500": str(free_port()), "/data/photos": str(photos)}
    here = {"MAIN_HOST": "127.0.0.1", "PROCESSES": "2", "PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    pods = [job_command(tmp_path / "run", index, here) for index in range(JOB["spec"]["completions"])]
    tiny = [[*(placed(word, places) for word in pod.arguments), *TRAIN, *SHORTEST] for pod in pods]
    said = finish(*(replace(pod, arguments=words).start() for pod, words in zip(pods, tiny, strict=True)))
    assert_trained(tmp_path / "run", "\n".join(said), processes=2)


@pytest.mark.matrix
def test_train_job_trains(photos: Path, tmp_path: Path) -> None:
    """torchrun with the variables that the Trainer's torch plugin sets."""
    trainer = TRAIN_JOB["spec"]["trainer"]
    places = {"/data/photos": str(photos), "/runs/photos": str(tmp_path / "run")}
    words = [placed(word, places) for word in (*trainer["command"], *trainer["args"])]
    rendezvous = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port()), "PET_NNODES": "2"}
    nodes = [
        Command([*words, *TRAIN, *SHORTEST], {**rendezvous, "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(rank)})
        for rank in range(trainer["numNodes"])
    ]
    said = finish(*(node.start() for node in nodes))
    assert_trained(tmp_path / "run", "\n".join(said), processes=2)


def job_command(run: Path, index: int, here: dict[str, str]) -> Command:
    """What pod number `index` does, with the variables that Kubernetes sets and some that differ here."""
    words = [placed(word, {"/launch/": f"{LAUNCH}/"}) for word in (*CONTAINER["command"], *CONTAINER["args"])]
    return Command(words, {**values(), "RUN": str(run), "JOB_COMPLETION_INDEX": str(index), **here})


def values() -> dict[str, str]:
    """The container's variables, without those that only a cluster knows."""
    return {variable["name"]: variable["value"] for variable in CONTAINER["env"] if "value" in variable}


def placed(word: str, places: dict[str, str]) -> str:
    for there, here in places.items():
        word = word.replace(there, here)
    return word
