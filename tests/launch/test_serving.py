"""The container and the Kubernetes manifest of the server: valid, consistent, and the container's steps run here."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from export.predict import Preprocessing
from export.serve.run import ServeConfig
from export.serve.server import SECONDS_OPEN, SECONDS_TO_ANSWER
from resnet_dist.cli.parser import read
from tests.conftest import write_image
from tests.export.means import write_means
from tests.export.serve.servers import get, running, send
from tests.launch.helpers import LAUNCH, ROOT

DOCKERFILE = LAUNCH / "Dockerfile"
TEXT = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
STEPS = [(line.split()[0], line.partition(" ")[2]) for line in TEXT.splitlines() if line.strip()]
SERVICE, DEPLOYMENT = yaml.safe_load_all((LAUNCH / "kubernetes-serve.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PROBES = {name: CONTAINER[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}


def step(kind: str) -> str:
    (found,) = (rest for name, rest in STEPS if name == kind)
    return found


def test_dockerfile_passes_the_linter() -> None:
    done = subprocess.run([Path(sys.executable).parent / "hadolint", DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_container_has_the_packages_that_the_server_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {*project["dependencies"], *project["optional-dependencies"]["serve"]}
    packages = {
        package.replace("${ONNXRUNTIME}", "onnxruntime") for package in re.findall(r'"(\S+>=\S+)"', step("RUN"))
    }
    assert packages <= known and set(project["optional-dependencies"]["serve"]) < packages


def test_container_is_no_root_and_serves() -> None:
    assert step("USER") == f"{POD['securityContext']['runAsUser']}:{POD['securityContext']['runAsGroup']}"
    assert int(step("USER").partition(":")[0]) > 0
    assert int(step("EXPOSE")) == ServeConfig().port and f":{step('EXPOSE')}/ready" in step("HEALTHCHECK")
    program, verb, *options = json.loads(step("ENTRYPOINT"))
    typed = read(ServeConfig, [*options, *CONTAINER["args"]])
    assert (program, verb, typed.problems) == ("resnet-dist", "serve", [])
    (mount,) = CONTAINER["volumeMounts"]
    assert typed.given["model"] == mount["mountPath"]


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("manifest", [SERVICE, DEPLOYMENT], ids=["Service", "Deployment"])
def test_manifest_is_valid(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_manifest_is_consistent() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == ServeConfig().port
    assert {SERVICE["spec"]["ports"][0]["targetPort"], *(p["httpGet"]["port"] for p in PROBES.values())} == {
        port["name"]
    }
    assert {name: probe["httpGet"]["path"] for name, probe in PROBES.items()} == {
        "startup": "/ready",
        "readiness": "/ready",
        "liveness": "/health",
    }
    sleep = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert sleep + SECONDS_OPEN + SECONDS_TO_ANSWER < POD["terminationGracePeriodSeconds"]
    (mount,), (volume,) = CONTAINER["volumeMounts"], POD["volumes"]
    assert mount["name"] == volume["name"]


@pytest.mark.matrix
def test_steps_of_the_container(tmp_path: Path) -> None:
    """What its RUN installs into a fresh environment starts its command, without torch, and passes its health check."""
    build, here = [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT], tmp_path / "env"
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    subprocess.run([sys.executable, "-m", "venv", here], check=True, timeout=300)
    path = f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "ONNXRUNTIME": re.findall(r"ONNXRUNTIME=(\S+)", step("ARG"))[0]}
    script = re.sub(r"^--mount=\S+", "", step("RUN")).replace("/dist/", f"{tmp_path}/dist/")
    subprocess.run(["sh", "-ec", script], check=True, env=variables, capture_output=True, timeout=600)
    assert subprocess.run([here / "bin" / "python", "-c", "import torch"], capture_output=True).returncode == 1
    write_means(tmp_path / "model.onnx", Preprocessing(img_size=32, resize=32), ["a", "b", "c"])
    write_image(tmp_path / "photo.png", seed=1)
    words = [
        word.replace("/model", str(tmp_path)).replace("0.0.0.0", "127.0.0.1") for word in json.loads(step("ENTRYPOINT"))
    ]
    with running([*words, "--port", "0"], env=variables, cwd=tmp_path) as server:
        connection = server.connect()
        assert send(connection, "image/png", (tmp_path / "photo.png").read_bytes()).status == 200
        assert get(connection, "/").status == 200
        connection.close()
        check = json.loads(step("HEALTHCHECK").partition("CMD ")[2])
        health = [word.replace(step("EXPOSE"), str(server.port)) for word in check]
        assert subprocess.run(health, env=variables, timeout=60).returncode == 0
        assert server.stop() == 0
    assert subprocess.run(health, env=variables, timeout=60, capture_output=True).returncode == 1
