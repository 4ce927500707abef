import numpy as np

from pyro_causalcell.report.replicates import Moments


def test_moments_are_of_the_right_cells():
    rng = np.random.default_rng(0)
    observed_ng, condition_n = rng.poisson(2.0, (400, 20)).astype(np.float32), np.repeat([3, 7], 200)
    observed_ng[condition_n == 7] += 5
    moments = Moments(observed_ng, condition_n)
    copies = [observed_ng, observed_ng + 1]
    passed = list(moments.watch(copies))
    assert [x is y for x, y in zip(passed, copies, strict=True)] == [True, True]  # nothing is changed
    arrays = moments.arrays()
    np.testing.assert_allclose(arrays["observed_mean_cg"][1], observed_ng[200:].mean(0), rtol=1e-5)
    np.testing.assert_allclose(arrays["predicted_mean_cg"], arrays["observed_mean_cg"] + 0.5, rtol=1e-5)
    np.testing.assert_allclose(arrays["predicted_mean_g"], arrays["observed_mean_g"] + 0.5, rtol=1e-5)
    np.testing.assert_allclose(arrays["predicted_variance_g"], arrays["observed_variance_g"])
    np.testing.assert_allclose(arrays["predicted_zero_g"], arrays["observed_zero_g"] / 2)
    np.testing.assert_array_equal(arrays["predicted_total_n"], observed_ng.sum(1))  # of the first
