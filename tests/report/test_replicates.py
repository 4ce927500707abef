import numpy as np
import pytest

from pyro_causalcell.errors import DataError
from pyro_causalcell.report.replicates import compare_replicates, coverage


def _counts(rng, mean, shape=(400, 20)):
    return rng.poisson(mean, shape).astype(np.float32)


def _coverage(observed_mean, replicated_mean):
    rng = np.random.default_rng(0)
    observed_ng = _counts(rng, observed_mean)
    replicates = (_counts(rng, replicated_mean) for _ in range(40))
    condition_n = np.arange(400) % 40
    compared = compare_replicates(observed_ng, replicates, condition_n)
    transforms = {"values": compared.pit_ng, "means": compared.pit_cg, "none": compared.pit_cg[:0]}
    table = coverage(transforms, [0.5, 0.9])
    assert table["values"].unique().tolist() == ["values", "means"]
    return table["observed"].to_numpy()


@pytest.mark.parametrize("mean", [0.1, 1.0, 30.0])
def test_the_right_model_is_calibrated_even_for_sparse_counts(mean):
    np.testing.assert_allclose(_coverage(mean, mean), [0.5, 0.9, 0.5, 0.9], atol=0.04)


def test_a_model_that_is_off_is_not():
    inside = _coverage(30.0, 34.0)
    assert inside[0] < 0.47 and inside[1] < 0.87
    assert inside[2] < 0.2 and inside[3] < 0.6  # means show it more clearly


def test_moments_are_of_the_right_cells():
    rng = np.random.default_rng(0)
    observed_ng, condition_n = _counts(rng, 2.0), np.repeat([3, 7], 200)
    observed_ng[condition_n == 7] += 5
    compared = compare_replicates(observed_ng, [observed_ng, observed_ng + 1], condition_n)
    checks = compared.checks
    assert compared.condition_c.tolist() == [3, 7]
    np.testing.assert_allclose(checks["observed_mean_cg"][1], observed_ng[200:].mean(0), rtol=1e-5)
    np.testing.assert_allclose(checks["predicted_mean_g"], checks["observed_mean_g"] + 0.5, rtol=1e-5)
    np.testing.assert_allclose(checks["predicted_variance_g"], checks["observed_variance_g"])
    np.testing.assert_array_equal(checks["predicted_total_n"], observed_ng.sum(1))


def test_replicates_are_needed():
    with pytest.raises(DataError, match="at least one replicate"):
        compare_replicates(np.ones((2, 2)), [], np.zeros(2, np.int64))
