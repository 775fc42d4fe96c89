import threading
import time

import pytest
from tensorflow_serving.apis.model_pb2 import ModelSpec
from tensorflow_serving.config.model_server_config_pb2 import ModelConfig

from tfopt.serving.server.errors import ServingError
from tfopt.serving.server.manager import AVAILABLE, END, Manager
from tfopt.serving.server.versions import aspired, found, stamp


class Fake:
    def __init__(self, name, version, path):
        self.version, self.path, self.closed = version, path, False
        if (path / "broken").exists():
            raise RuntimeError("it is broken")

    def close(self):
        self.closed = True


def versions(base, *numbers):
    for number in numbers:
        (base / str(number)).mkdir(parents=True)
    return base


def config(base, name="m", **policy):
    made = ModelConfig(name=name, base_path=str(base))
    if "latest" in policy:
        made.model_version_policy.latest.num_versions = policy["latest"]
    if "specific" in policy:
        made.model_version_policy.specific.versions.extend(policy["specific"])
    if "all" in policy:
        made.model_version_policy.all.SetInParent()
    for label, number in policy.get("labels", {}).items():
        made.version_labels[label] = number
    return made


def spec(name="m", version=None, label=None):
    made = ModelSpec(name=name)
    if version is not None:
        made.version.value = version
    if label is not None:
        made.version_label = label
    return made


def manager(*configs, **options):
    made = Manager(Fake, **options)
    made.configure({c.name: c for c in configs})
    return made


def states(made, name="m"):
    return {v.number: v.state for v in made.status(spec(name))}


def asked(made, *args, **kwargs):
    with made.using(spec(*args, **kwargs)) as servable:
        return servable.version


def test_version_directories(tmp_path):
    versions(tmp_path, "00000123", 7, "x1", "-3", "1.5", "٣")
    (tmp_path / "9").write_text("a file")
    assert list(found(tmp_path)) == [7, 123] and found(tmp_path / "none") == {}


@pytest.mark.parametrize(
    "policy, expected", [({}, [5]), ({"latest": 2}, [3, 5]), ({"all": True}, [1, 3, 5]), ({"specific": [1, 9]}, [1])]
)
def test_policies(tmp_path, policy, expected):
    assert list(aspired(config(versions(tmp_path, 1, 3, 5), **policy))) == expected
    made = manager(config(tmp_path, **policy))
    assert sorted(states(made)) == expected and asked(made) == expected[-1]


def test_a_new_version_takes_over_and_the_old_one_goes(tmp_path):
    made = manager(config(versions(tmp_path, 1)))
    with made.using(spec()) as old:
        versions(tmp_path, 2)
        polling = threading.Thread(target=made.poll)
        polling.start()
        end = time.monotonic() + 10
        while asked(made) == 1 and time.monotonic() < end:
            time.sleep(0.01)
        assert asked(made) == 2
        time.sleep(0.05)
        assert polling.is_alive() and not old.closed  # a request is still in it
        with pytest.raises(ServingError, match=r"Servable not found for request: Specific\(m, 1\)"):
            asked(made, version=1)
    polling.join(10)
    assert old.closed and states(made) == {1: END, 2: AVAILABLE}


def test_a_version_that_fails_leaves_the_old_one_and_is_tried_again_when_its_files_change(tmp_path):
    made = manager(config(versions(tmp_path, 1)))
    versions(tmp_path, 2)
    (tmp_path / "2" / "broken").touch()
    for _ in range(3):
        made.poll()
    assert states(made) == {1: AVAILABLE, 2: END} and asked(made) == 1
    (failed, _) = made.status(spec())
    assert "it is broken" in failed.error.message
    (tmp_path / "2" / "broken").unlink()
    made.poll()
    assert states(made) == {1: END, 2: AVAILABLE} and asked(made) == 2


def test_a_version_that_is_taken_back(tmp_path):
    made = manager(config(versions(tmp_path, 1, 2)))
    (tmp_path / "2").rmdir()
    made.poll()
    assert asked(made) == 1 and states(made) == {1: AVAILABLE, 2: END}
    versions(tmp_path, 2)
    made.poll()
    assert asked(made) == 2
    for number in (1, 2):
        (tmp_path / str(number)).rmdir()
    made.poll()
    with pytest.raises(ServingError, match=r"Servable not found for request: Latest\(m\)"):
        asked(made)


def test_what_cannot_be_found(tmp_path):
    made = manager(config(versions(tmp_path, 1)))
    for arguments, code, words in (
        ({"name": "other"}, "NOT_FOUND", r"Latest\(other\)"),
        ({"version": 7}, "NOT_FOUND", r"Specific\(m, 7\)"),
        ({"label": "stable"}, "INVALID_ARGUMENT", "Unrecognized servable version label: stable"),
        ({"name": ""}, "INVALID_ARGUMENT", "no name"),
    ):
        with pytest.raises(ServingError, match=words) as error:
            asked(made, **arguments)
        assert error.value.code.name == code
    with pytest.raises(ServingError, match="Could not find any versions of model other"):
        made.status(spec("other"))
    with pytest.raises(ServingError, match="Could not find version 7 of model m"):
        made.status(spec(version=7))


def test_labels(tmp_path):
    versions(tmp_path, 1, 2)
    with pytest.raises(ServingError, match="not currently available for inference"):
        manager(config(tmp_path, all=True, labels={"stable": 1}))
    made = manager(config(tmp_path, all=True, labels={"stable": 1}), labels_need_available=False)
    assert asked(made, label="stable") == 1
    made = manager(config(tmp_path, all=True))
    made.configure({"m": config(tmp_path, all=True, labels={"stable": 1, "canary": 2})})
    assert (asked(made, label="stable"), asked(made, label="canary")) == (1, 2)
    with pytest.raises(ServingError, match="to version 3 of model m, which is not") as error:
        made.configure({"m": config(tmp_path, all=True, labels={"stable": 3})})
    assert error.value.code.name == "FAILED_PRECONDITION" and asked(made, label="stable") == 1


def test_models_come_and_go_with_the_configuration(tmp_path):
    a, b = versions(tmp_path / "a", 1), versions(tmp_path / "b", 4)
    made = manager(config(a, "a"))
    with made.using(spec("a")) as servable:
        pass
    made.configure({"b": config(b, "b")})
    assert asked(made, "b") == 4 and servable.closed
    with pytest.raises(ServingError, match=r"Latest\(a\)"):
        asked(made, "a")
    made.close()
    with pytest.raises(ServingError):
        asked(made, "b")


def test_a_model_without_a_version_is_an_error_that_names_the_reason(tmp_path):
    with pytest.raises(ServingError, match=r"1 servable\(s\) did not become available: .*no versions in .*none"):
        manager(config(tmp_path / "none"))
    versions(tmp_path, 1)
    (tmp_path / "1" / "broken").touch()
    with pytest.raises(ServingError, match="version 1: it is broken"):
        manager(config(tmp_path))


def test_stamp_sees_every_file(tmp_path):
    (tmp_path / "variables").mkdir()
    before = stamp(tmp_path)
    (tmp_path / "variables" / "data").write_text("x")
    assert stamp(tmp_path) != before
