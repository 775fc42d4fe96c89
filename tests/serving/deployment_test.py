"""Deployment files: every one is read back by what reads it in production, or by a parser of its format."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess

import pytest

from tfopt.errors import TfoptError
from tfopt.serving import batching_parameters, deployment, model_config, session_config, warmup
from tfopt.serving.batching_parameters import BatchingParameters
from tfopt.serving.deployment import Options

yaml = pytest.importorskip("yaml")
QUICK = Options(session_config=False, peak_memory_bytes=1000 << 20)


@pytest.fixture
def base(built, tmp_path):
    """A function from the name of a model in tests/origins.py to a base path with it as version 2, and an empty 1."""

    def make(name="shared_weights"):
        root = tmp_path / "models" / "m"
        shutil.copytree(built(name), root / "2", copy_function=shutil.copyfile)
        (root / "1").mkdir()
        return root

    return make


def listed(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def written(built, tmp_path_factory):
    """(base path, what was written) of a model that can be batched."""
    root = tmp_path_factory.mktemp("written") / "Half Plus Two"
    shutil.copytree(built("shared_weights"), root / "2", copy_function=shutil.copyfile)
    options = dataclasses.replace(QUICK, per_model_batching=True, cpus=4, image="registry/serving:1.2")
    return root, deployment.write(root, "Half_Plus.two", options)


def test_everything_is_there(written):
    root, made = written
    names = {str(p.relative_to(root)) for p in made.paths}
    assert names == {
        "batching_params.pbtxt", "models.config", "docker-compose.yaml", "kubernetes.yaml", "serve.sh",
        "2/batching_params.pbtxt", "2/assets.extra/tf_serving_warmup_requests",
    }  # fmt: skip
    assert all(p.is_file() and not p.is_symlink() for p in made.paths)
    assert sorted(p.name for p in root.parent.iterdir()) == [root.name]  # no draft is left
    parameters = batching_parameters.read(root / "batching_params.pbtxt")
    assert parameters == deployment.start_values(4) == batching_parameters.read(root / "2" / "batching_params.pbtxt")
    assert "tfopt-tune-batching" in (root / "batching_params.pbtxt").read_text()
    logs = list(warmup.read(root / "2" / warmup.FILE))
    assert len(logs) == 2 * len(parameters.allowed_batch_sizes)
    (config,) = model_config.read(root / "models.config").model_config_list.config
    assert (config.name, config.base_path, config.model_platform) == (
        "Half_Plus.two", "/models/Half_Plus.two", "tensorflow",
    )  # fmt: skip


def test_compose(written):
    root, _ = written
    (service,) = yaml.safe_load((root / "docker-compose.yaml").read_text())["services"].values()
    assert service["image"] == "registry/serving:1.2"
    assert service["entrypoint"] == ["tensorflow_model_server"]
    assert "--model_config_file=/models/Half_Plus.two/models.config" in service["command"]
    assert "--batching_parameters_file=/models/Half_Plus.two/batching_params.pbtxt" in service["command"]
    assert "--tensorflow_intra_op_parallelism=4" in service["command"]
    assert service["ports"] == ["8500:8500", "8501:8501"]
    assert service["volumes"] == [{"type": "bind", "source": ".", "target": "/models/Half_Plus.two", "read_only": True}]
    assert service["deploy"]["resources"]["limits"] == {"cpus": "4", "memory": "2560M"}  # twice 1.25 times 1000 MiB
    assert "GET /v1/models/Half_Plus.two HTTP/1.0\\r\\n" in service["healthcheck"]["test"][-1]


def test_the_healthcheck_sees_whether_a_model_is_available(written):
    """Bash carries it out against a server that answers as the status page does."""
    import http.server
    import threading

    root, _ = written
    (service,) = yaml.safe_load((root / "docker-compose.yaml").read_text())["services"].values()
    said = {}

    class Status(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            said["path"] = self.path
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"model_version_status": [{"state": said["state"]}]}).encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Status)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = service["healthcheck"]["test"][1:]
    command[-1] = command[-1].replace("/8501", f"/{server.server_port}")
    try:
        for said["state"], code in (("AVAILABLE", 0), ("LOADING", 1)):
            assert subprocess.run(command, timeout=20).returncode == code
        assert said["path"] == "/v1/models/Half_Plus.two"
    finally:
        server.shutdown()
        server.server_close()
    assert subprocess.run(command, timeout=20, capture_output=True).returncode != 0


def test_kubernetes(written):
    root, _ = written
    documents = list(yaml.safe_load_all((root / "kubernetes.yaml").read_text()))
    by_kind = {document["kind"]: document for document in documents}
    assert list(by_kind) == ["Deployment", "ConfigMap", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"]
    name = by_kind["Deployment"]["metadata"]["name"]
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
    pod = by_kind["Deployment"]["spec"]["template"]
    assert pod["metadata"]["labels"] == by_kind["Service"]["spec"]["selector"]
    (container,) = pod["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "4", "memory": "1280Mi"},
        "limits": {"cpu": "4", "memory": "2560Mi"},
    }
    ports = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/v1/models/Half_Plus.two", "port": "rest"} and "rest" in ports
    assert {port["targetPort"] for port in by_kind["Service"]["spec"]["ports"]} == ports
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert all(mount["readOnly"] for mount in mounts.values())
    scaler = by_kind["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == name and (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 10)


def test_serve_sh_runs_the_line_that_is_printed(written, tmp_path):
    root, made = written
    binary = tmp_path / "tensorflow_model_server"
    binary.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    binary.chmod(0o755)
    ran = subprocess.run(
        [root / "serve.sh", "--extra=1"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    *arguments, extra = ran.stdout.splitlines()
    assert extra == "--extra=1"
    assert " ".join(["tensorflow_model_server", *arguments]) == made.command
    assert f"--model_base_path={root}" in arguments


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("counter", QUICK, "signature 'peek': it has no input|signature 'count'"),
        ("shared_weights", dataclasses.replace(QUICK, enable_batching=False), "batching is left off"),
    ],
)
def test_no_batching_where_there_is_none(base, name, options, why):
    root = base(name)
    made = deployment.write(root, "m", options)
    assert not (root / "batching_params.pbtxt").exists()
    assert "enable_batching" not in (root / "docker-compose.yaml").read_text() + made.command
    assert any(re.search(why, note) for note in made.notes if "no batching_params.pbtxt" in note)


def test_given_values_are_taken(base):
    root = base()
    given = BatchingParameters(max_batch_size=6, allowed_batch_sizes=(3, 6), num_batch_threads=1)
    deployment.write(root, "m", dataclasses.replace(QUICK, batching=given))
    assert batching_parameters.read(root / "batching_params.pbtxt") == given
    assert (root / "batching_params.pbtxt").read_text() == given.text()
    sizes = {len(next(iter(warmup.arrays(log).values()))) for log in warmup.read(root / "2" / warmup.FILE)}
    assert sizes == {3, 6}


def test_all_or_nothing(base, monkeypatch):
    root = base()
    before = listed(root)
    with pytest.raises(TfoptError, match="holds no version 7"):
        deployment.write(root, "m", QUICK, version=7)
    with pytest.raises(TfoptError, match=r"rows\.npz"):
        deployment.write(root, "m", dataclasses.replace(QUICK, data="/no/such/rows.npz"))
    monkeypatch.setattr(model_config, "text", lambda *_: (_ for _ in ()).throw(TfoptError("late")))
    with pytest.raises(TfoptError, match="late"):
        deployment.write(root, "m", QUICK)
    assert listed(root) == before and [p.name for p in root.parent.iterdir()] == ["m"]


def test_what_exists_is_kept_without_overwrite(base):
    root = base()
    (root / "models.config").write_text("mine")
    with pytest.raises(TfoptError, match=r"--model_base_path=.*: holds models.config already; pass --overwrite"):
        deployment.write(root, "m", QUICK)
    assert (root / "models.config").read_text() == "mine" and not (root / "serve.sh").exists()
    deployment.write(root, "m", QUICK, overwrite=True)
    first = listed(root)
    deployment.write(root, "m", dataclasses.replace(QUICK, enable_batching=False), overwrite=True)
    assert set(first) - set(listed(root)) == {"batching_params.pbtxt"}  # nothing of the last run stays that is not true


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a/b", QUICK, "--model_name='a/b': letters"),
        ("", QUICK, "--model_name=''"),
        ("m", dataclasses.replace(QUICK, cpus=0), "--cpus"),
        ("m", dataclasses.replace(QUICK, min_replicas=3, max_replicas=2), "--max_replicas"),
    ],
)
def test_bad_options_end_in_one_line(base, name, options, words):
    root = base()
    with pytest.raises(TfoptError) as caught:
        deployment.write(root, name, options)
    assert words in str(caught.value) and not (root / "serve.sh").exists()


def test_a_base_path_without_versions(tmp_path, built):
    with pytest.raises(TfoptError, match="no such directory"):
        deployment.latest_version(tmp_path / "nothing")
    with pytest.raises(TfoptError, match="holds no version directory; versions are named"):
        deployment.latest_version(tmp_path)
    with pytest.raises(TfoptError, match="it is a SavedModel itself"):
        deployment.latest_version(built("shared_weights"))


def test_memory_is_measured_and_written(base):
    root = base()
    options = dataclasses.replace(QUICK, peak_memory_bytes=None)
    made = deployment.write(root, "m", options)
    (note,) = [note for note in made.notes if note.startswith("Memory")]
    assert "as measured" in note and 100 < int(re.search(r"(\d+) MiB", note)[1]) < 4000
    shutil.rmtree(root / "2" / "assets.extra")
    made = deployment.write(root, "m", dataclasses.replace(options, warmup=False), overwrite=True)
    assert any("as estimated" in note for note in made.notes)


def test_session_overrides_are_the_real_proto():
    """Field numbers against a file that TensorFlow Serving tests itself with, and against TensorFlow's descriptors."""
    assert session_config.serialized() == b"\x0a\x02\x18\x01"


def test_session_overrides_of_others_stay(base, shared):
    real = (
        shared / "models" / "tf-serving-testdata" / "saved_model_half_plus_two_cpu_with_saved_model_config" / "00000123"
    )
    root = base()
    (root / "2" / "assets.extra").mkdir()
    mine = (real / session_config.FILE).read_bytes()
    assert mine[:1] == session_config.serialized()[:1]  # its first field is session_overrides too
    (root / "2" / session_config.FILE).write_bytes(mine)
    made = deployment.write(root, "m", dataclasses.replace(QUICK, session_config=True), overwrite=True)
    assert (root / "2" / session_config.FILE).read_bytes() == mine
    assert any("kept as it is" in note for note in made.notes)


def test_session_overrides_are_written_where_they_gain_only(base, monkeypatch):
    root = base()
    gain = session_config.Gain(ratio=1.4, least=1.2, load_ratio=1.5, moved=None)
    monkeypatch.setattr(session_config, "measure", lambda *_: gain)
    made = deployment.write(root, "m", dataclasses.replace(QUICK, session_config=True))
    assert (root / "2" / session_config.FILE).read_bytes() == session_config.serialized()
    assert any("turns grappler off: requests 1.40x" in note for note in made.notes)
    monkeypatch.setattr(session_config, "measure", lambda *_: dataclasses.replace(gain, least=1.01))
    made = deployment.write(root, "m", dataclasses.replace(QUICK, session_config=True), overwrite=True)
    assert not (root / "2" / session_config.FILE).exists()
    assert any("no gain" in note for note in made.notes)
    assert not dataclasses.replace(gain, moved="output 'y' is off").worth


def test_measuring_session_overrides(built, tmp_path):
    model = tmp_path / "1"
    shutil.copytree(built("keras3_export"), model, copy_function=shutil.copyfile)
    gain = session_config.measure(model, list(warmup.read(warmup.write(model, [4]).path)))
    assert gain.moved is None and 0.1 < gain.least <= gain.ratio < 10 and gain.load_ratio > 0
