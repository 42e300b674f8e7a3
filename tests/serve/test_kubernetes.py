"""The manifests in configs/serve: what they start, and that their parts name each other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from qjax.cli import main

SERVE = Path(__file__).parents[2] / "configs/serve"
MANIFESTS = sorted(SERVE.glob("kubernetes-*.yaml"))
VERSIONS = {"Service": "v1", "Job": "batch/v1", "Deployment": "apps/v1"}


def parts(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Service, what starts the pods, a pod, and its container."""
    service, owner = yaml.safe_load_all((SERVE / name).read_text())
    pod = owner["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return service, owner, pod, container


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_parts_name_each_other(path: Path) -> None:
    service, owner, pod, container = parts(path.name)
    for each in (service, owner):
        assert each["apiVersion"] == VERSIONS[each["kind"]]
    assert service["kind"] == "Service"
    labels = owner["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    if owner["kind"] == "Deployment":  # a job labels its pods itself
        assert owner["spec"]["selector"]["matchLabels"].items() <= labels.items()
    volumes, mounts = pod["volumes"], container["volumeMounts"]
    assert [volume["name"] for volume in volumes] == [mount["name"] for mount in mounts]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert all(port["targetPort"] in ports for port in service["spec"].get("ports", ()))
    probes = [value for key, value in container.items() if key.endswith("Probe")]
    assert all(probe["httpGet"]["port"] in ports for probe in probes)
    # An image is to be filled in: no registry is named.
    assert container["image"] == "${IMAGE}"
    assert "envsubst '$IMAGE'" in path.read_text()


def test_two_hosts() -> None:
    service, job, pod, container = parts("kubernetes-2x8.yaml")
    assert container["command"] == ["qjax", "generate"]
    generate: Any = get_command(main.app).commands["generate"]  # type: ignore[attr-defined]
    for index in ("0", "1"):
        args = [arg.replace("$(JOB_COMPLETION_INDEX)", index) for arg in container["args"]]
        found = generate.make_context("generate", args).params
        assert found["process_id"] == int(index)
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == found["num_processes"] == 2
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert found["tensor_parallel_size"] == gpus * found["num_processes"]
    # The name that an indexed job and a headless service give the first pod.
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert pod["subdomain"] == service["metadata"]["name"]
    (port,) = container["ports"]
    first = f"{job['metadata']['name']}-0.{pod['subdomain']}:{port['containerPort']}"
    assert found["coordinator_address"] == first
    same = yaml.safe_load((SERVE / "gpu-2x8.yaml").read_text())
    assert {key: found[key.replace("-", "_")] for key in same} == same


def assignments(source: str, name: str) -> Iterator[str]:
    """The fields of a class."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield from (ast.unparse(n.target) for n in node.body if isinstance(n, ast.AnnAssign))


def test_replicas() -> None:
    service, deployment, pod, container = parts("kubernetes-replicas.yaml")
    source = (SERVE / "ray_serve.py").read_text()
    given = dict(arg.split("=") for arg in container["args"])
    assert given.keys() <= set(assignments(source, "Options"))
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(given["gpus"]) == int(given["tensor_parallel_size"]) == gpus
    assert int(given["cpus"]) < container["resources"]["requests"]["cpu"]
    same = yaml.safe_load((SERVE / "gpu-8.yaml").read_text())
    assert {key: given[key.replace("-", "_")] for key in same} == {k: str(same[k]) for k in same}
    # The program comes from a config map that is made of the file.
    python, program = container["command"]
    mount, volume = container["volumeMounts"][0], pod["volumes"][0]
    assert (python, program) == ("python", f"{mount['mountPath']}/ray_serve.py")
    create = f"configmap {volume['configMap']['name']} --from-file=configs/serve/ray_serve.py"
    assert create in (SERVE / "kubernetes-replicas.yaml").read_text()
    assert f'"port": {container["ports"][0]["containerPort"]}}}' in source
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert deployment["spec"]["replicas"] == 2


@pytest.mark.peer
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_schema(path: Path) -> None:
    """By the schemas of Kubernetes itself, in which a key that is none is an error."""
    validator = pytest.importorskip("kubernetes_validate")
    for each in yaml.safe_load_all(re.sub(r"\$\{IMAGE\}", "image", path.read_text())):
        validator.validate(each, validator.latest_version(), strict=True)
