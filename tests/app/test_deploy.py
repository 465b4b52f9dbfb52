"""The deployment files match the schemas of Ray and KubeRay, and a job package contains only code."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema
from support.waiting import skip_or_fail

from serve.node import FAST_PATH

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = sorted((ROOT / "deploy" / "kuberay").glob("*.yaml"))
NETWORK_POLICY = ROOT / "deploy" / "kuberay" / "network-policy.yaml"
OPERATOR = "github.com/ray-project/kuberay/ray-operator@v1.6.1"
PACKAGE_BYTES = 3_000_000
PACKAGES = ("app", "serve", "ml", "pipelines", "lakehouse")


def loaded(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


def test_the_cluster_launcher_accepts_cluster_yaml() -> None:
    config = prepare_config(loaded(ROOT / "cluster.yaml"))
    validate_config(config)
    assert config["head_node_type"] == "head"
    # the head runs no tasks
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    with pytest.raises(Exception, match="max_workrs"):
        validate_config({**config, "max_workrs": 1})


def test_the_cluster_launcher_writes_only_below_the_home_of_the_ssh_user() -> None:
    """Ray creates the directories of file_mounts as ssh_user, without sudo, before any other command."""
    config = loaded(ROOT / "cluster.yaml")
    mounts = config["file_mounts"]
    assert all(remote.startswith("~/") for remote in mounts)
    assert not re.search(r"(?<!~)/(etc|opt)/", json.dumps(config))
    (environment,) = (remote for remote in mounts if remote.endswith("environment"))
    assert mounts[environment] == environment
    assert f"\n# {environment}\n" in (ROOT / "docs" / "how-to" / "deploy-on-a-cluster.md").read_text()
    for kind in ("head", "worker"):
        assert f". {environment}" in " ".join(config[f"{kind}_start_ray_commands"])


def test_kuberay_serving_nodes_have_the_fast_path() -> None:
    """Without it in the node's environment, HAProxy sends the path of each request to UDP port 514."""
    groups = loaded(ROOT / "deploy" / "kuberay" / "serve.yaml")["spec"]["rayClusterConfig"]
    for group in (groups["headGroupSpec"], *groups["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        given = {one["name"]: one["value"] for one in container["env"]}
        assert FAST_PATH.items() <= given.items()
    commented = (ROOT / "serve" / "deploy.yaml").read_text()
    for name, value in FAST_PATH.items():
        quoted = "$'" + value.replace("\n", "\\n") + "'" if "\n" in value else value
        assert f"{name}={quoted}" in commented


def test_pods_have_no_privileges_and_their_ports_are_closed_to_other_pods() -> None:
    def containers(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict):
            yield from value.get("containers", ())
            for inner in value.values():
                yield from containers(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from containers(inner)

    for file in KUBERAY:
        for container in containers(loaded(file)):
            rights = container["securityContext"]
            assert rights["runAsNonRoot"], file.name
            assert not rights["allowPrivilegeEscalation"], file.name
            assert rights["capabilities"] == {"drop": ["ALL"]}, file.name
    spec = loaded(NETWORK_POLICY)["spec"]
    own = {"podSelector": spec["podSelector"]}
    unrestricted = [rule for rule in spec["ingress"] if "ports" not in rule]
    assert own in unrestricted[0]["from"]
    assert [rule["ports"] for rule in spec["ingress"] if "ports" in rule] == [[{"port": 8000, "protocol": "TCP"}]]
    assert all(rule["from"] for rule in spec["ingress"])


def test_every_pinned_package_has_hashes() -> None:
    runtime, development = (locked(ROOT / f"requirements{suffix}.lock") for suffix in ("", "-dev"))
    assert runtime.items() <= development.items()
    assert all(runtime.values())
    assert all(development.values())
    assert not {name for name in runtime if name.startswith(("pytest", "moto", "hypothesis", "mypy", "ruff"))}


def locked(file: Path) -> dict[str, tuple[str, ...]]:
    """Return the hashes of each pinned package in a lock file."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in file.read_text().splitlines():
        if not line.startswith(" "):
            name = line.split(" ")[0]  # without markers
            found.setdefault(name, [])
        elif digest := re.match(r" +--hash=(\S+)", line):
            found[name].append(digest[1])
    return {name: tuple(hashes) for name, hashes in found.items()}


def test_serve_accepts_both_files() -> None:
    plain = ServeDeploySchema.model_validate(loaded(ROOT / "serve" / "deploy.yaml"))
    spread = ServeDeploySchema.model_validate(yaml.safe_load(loaded(ROOT / "deploy/kuberay/serve.yaml")["spec"]["serveConfigV2"]))
    for one in (plain, spread):
        (application,) = one.applications
        assert application.import_path == "app.serving:build"
        assert application.args["host"] == one.http_options.host
        assert application.args["port"] == one.http_options.port
        assert not application.runtime_env


@pytest.mark.parametrize("file", [ROOT / "cluster.yaml", *KUBERAY], ids=lambda file: file.name)
def test_no_file_contains_a_secret_or_an_account(file: Path) -> None:
    def texts(value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from ((str(key), text) if not at else (at, text) for at, text in texts(inner))
            if {"name", "value"} <= value.keys():
                yield str(value["name"]), str(value["value"])
        elif isinstance(value, list):
            for inner in value:
                yield from texts(inner)
        else:
            yield "", str(value)

    for name, text in texts(loaded(file)):
        assert not any(word in name.upper() for word in ("PASSWORD", "TOKEN", "SECRET_ACCESS", "DSN")), (name, text)
        assert not (text.isdigit() and len(text) == 12), f"an account id: {text}"


def test_a_job_package_contains_only_code(tmp_path: Path) -> None:
    copied = tmp_path / "project"
    skipped = shutil.ignore_patterns(".git", ".venv", ".shopsphere", "__pycache__")
    shutil.copytree(ROOT, copied, ignore=skipped)
    for name in (".shopsphere/shopsphere.toml", ".env", ".venv/bin/python", ".git/config"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_text("secret")
    package = tmp_path / "package.zip"
    create_package(str(copied), package, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
    assert package.stat().st_size < PACKAGE_BYTES
    tops = {name.split("/")[0] for name in names}
    assert set(PACKAGES) <= tops
    assert not {name for name in tops if name.startswith(".") or name in ("tests", "bench", "docs", "deploy")}
    code = {path.relative_to(ROOT).as_posix() for top in PACKAGES for path in (ROOT / top).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    assert code <= set(names)


@pytest.fixture(scope="module")
def definitions() -> dict[str, dict[str, Any]]:
    """Return KubeRay's custom resource definitions by kind, from Go's module proxy."""
    missing = f"needs Go and its module proxy for {OPERATOR}: install Go from your system's packages"
    try:
        got = subprocess.run(
            ["go", "mod", "download", "-json", OPERATOR],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            cwd="/",
            env={**os.environ, "GOFLAGS": "-mod=mod"},
        )
    except (OSError, subprocess.SubprocessError) as error:
        skip_or_fail(f"{missing} ({error})")
    bases = Path(json.loads(got.stdout)["Dir"]) / "config" / "crd" / "bases"
    found = [yaml.safe_load(file.read_text())["spec"] for file in bases.glob("ray.io_*.yaml")]
    return {
        one["names"]["kind"]: strict(version["schema"]["openAPIV3Schema"])
        for one in found
        for version in one["versions"]
        if version["name"] == "v1"
    }


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema as `kubectl --validate=strict` applies it: an unknown field is an error."""
    schema = copy.copy(schema)
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        schema["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        schema["items"] = strict(schema["items"])
    return schema


def whole(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema with the fields that every Kubernetes object has."""
    return {**schema, "properties": {**schema["properties"], "metadata": {"type": "object"}}}


@pytest.mark.cluster
@pytest.mark.parametrize("file", [file for file in KUBERAY if file != NETWORK_POLICY], ids=lambda file: file.name)
def test_kuberay_accepts_the_manifests(file: Path, definitions: dict[str, dict[str, Any]]) -> None:
    manifest = loaded(file)
    schema = whole(definitions[manifest["kind"]])
    jsonschema.validate(manifest, schema)
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["headGroupSpecs"] = {}
    with pytest.raises(jsonschema.ValidationError, match="headGroupSpecs"):
        jsonschema.validate(wrong, schema)
