import numpy as np
import pytest

from tests.origins import ORIGINS, answers
from tfopt.serving.batching_parameters import BatchingParameters
from tfopt.serving.server.errors import ServingError
from tfopt.serving.server.servable import LoadOptions, Servable

MODELS = [
    "tf1_ref_variables", "tf1_tables_and_assets", "static_tables", "tf1_feeds_an_intermediate_tensor", "dtypes",
    "unicode_names",
]  # fmt: skip


@pytest.mark.parametrize("batching", [None, BatchingParameters(max_batch_size=64)], ids=["plain", "batched"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_a_session(built, name, batching):
    servable = Servable(name, 1, built(name), LoadOptions(batching=batching))
    expected = answers(built(name), ORIGINS[name].inputs)
    for signature, fed in ORIGINS[name].inputs.items():
        found = servable.run_all(signature, {key: np.asarray(value) for key, value in fed.items()})
        assert found.keys() == expected[signature][0].keys()
        for key, value in expected[signature][0].items():
            if np.asarray(value).dtype.kind in "fcV":
                np.testing.assert_allclose(
                    found[key].astype(np.complex128), np.asarray(value).astype(np.complex128), rtol=1e-4, atol=1e-5
                )
            else:
                np.testing.assert_array_equal(found[key], value)
    servable.close()


@pytest.mark.parametrize("intra, inter", [(1, 1), (2, 2)])
def test_state_is_kept_between_requests_whatever_the_threads(built, intra, inter):
    servable = Servable("counter", 1, built("counter"), LoadOptions(intra_op=intra, inter_op=inter))
    x = {"x": np.zeros((1, 4), np.float32)}
    calls = [servable.run_all("count", x)["calls"].item() for _ in range(3)]
    assert calls == [8, 9, 10]
    servable.close()


def test_what_a_session_refuses_is_the_clients_error(built):
    servable = Servable("passed", 1, built("results_that_nothing_computes"), LoadOptions())
    with pytest.raises(ServingError, match="both fed and fetched"):
        servable.run("passed", {"x": np.ones((2, 3), np.float32)}, ["x"])
    servable.close()
