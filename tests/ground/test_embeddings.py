"""What embeddings of targets say: the standardised table, the regression behind q(B), priors and guides."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from pyro_causalcell import embeddings
from pyro_causalcell.embeddings import (
    DescriptionGuide,
    EffectMapGuide,
    GateCurveGuide,
    Reading,
    described,
    expected_effects,
    expected_gates,
    seen_targets,
    squared_size,
    standardised,
    where_open,
)

SEEN = torch.tensor([True, True, False, True, True, True])


def _table(n_columns: int = 3) -> torch.Tensor:
    return torch.randn(len(SEEN), n_columns, generator=torch.Generator().manual_seed(0)) * 4 + 7


def test_standardised_tables_keep_distances_between_standardised_rows():
    table_pe = _table()
    found = standardised(table_pe, SEEN)
    plain = (table_pe - table_pe[SEEN].mean(0)) / table_pe[SEEN].std(0, correction=0) / math.sqrt(3)
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(plain, plain), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[SEEN].mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    assert float(found[SEEN].square().sum(1).mean()) == pytest.approx(1.0)
    gram_ee = found[SEEN].T @ found[SEEN]
    torch.testing.assert_close(gram_ee, gram_ee.diagonal().diag_embed(), atol=1e-5, rtol=0)


def test_unseen_targets_have_no_say_in_how_a_table_is_standardised():
    table_pe, moved_pe = _table(), _table()
    moved_pe[2] += 100.0
    torch.testing.assert_close(standardised(table_pe, SEEN)[SEEN], standardised(moved_pe, SEEN)[SEEN])


def test_constant_columns_become_zero_and_wide_tables_are_cut(monkeypatch):
    table_pe = torch.cat([_table(), torch.full((6, 1), 5.0)], 1)
    torch.testing.assert_close(
        standardised(table_pe, SEEN).square().sum(1), standardised(_table(), SEEN).square().sum(1)
    )
    monkeypatch.setattr(embeddings, "MOST_COLUMNS", 2)
    kept = standardised(_table(), SEEN)
    assert kept.shape == (6, 2) and bool((kept[SEEN].var(0) > 0.05).all())


def test_the_map_is_the_ridge_of_scikit_learn_at_its_penalty():
    torch.manual_seed(1)
    table_pe = standardised(_table(), SEEN)
    effect_pd = table_pe @ torch.tensor([[2.0, 0.0], [-1.0, 0.5], [0.0, 0.0]]) + 1 + 0.1 * torch.randn(6, 2)
    mean_df, sd_df = embeddings._regression(table_pe, effect_pd, SEEN)
    assert bool((sd_df > 0).all())
    size_e = table_pe[SEEN].square().sum(0)
    for d in range(2):  # the penalty 1 / ρ of each output from one of its standard deviations
        noise = sd_df[d, -1] * math.sqrt(5)
        penalty = float((noise / sd_df[d, 0]) ** 2 - size_e[0])
        ridge = Ridge(penalty).fit(table_pe[SEEN].numpy(), effect_pd[SEEN, d].numpy())
        torch.testing.assert_close(mean_df[d, :-1], torch.from_numpy(ridge.coef_), rtol=1e-3, atol=1e-3)
        assert float(mean_df[d, -1]) == pytest.approx(float(ridge.intercept_), abs=1e-5)


def test_all_effects_share_the_penalty_that_predicts_each_target_best_from_the_others():
    torch.manual_seed(2)
    table_pe, seen_p = torch.randn(12, 8), torch.tensor([True] * 11 + [False])
    table_pe = standardised(table_pe, seen_p)
    effect_pd = table_pe @ torch.randn(8, 3) + 0.5 * torch.randn(12, 3)
    effect_pd[11] = 100.0  # never measured: has no say
    x_pe, y_pd = table_pe[seen_p].numpy(), effect_pd[seen_p].numpy()
    penalties = 10 ** torch.linspace(3, -3, 13).double().numpy()
    missed = [
        ((cross_val_predict(Ridge(penalty), x_pe, y_pd, cv=LeaveOneOut()) - y_pd) ** 2).sum()
        for penalty in penalties
    ]
    best = int(torch.tensor(missed).argmin())
    assert 0 < best < 12
    mean_df, _ = embeddings._regression(table_pe, effect_pd, seen_p)
    expected = torch.from_numpy(Ridge(penalties[best]).fit(x_pe, y_pd).coef_).float()
    torch.testing.assert_close(mean_df[:, :-1], expected, rtol=1e-3, atol=1e-3)


def test_what_is_expected_is_kept_by_effects_that_are_there_at_times():
    expected_pv, logit_pv = torch.tensor([[0.9, -0.2]]), torch.tensor([[0.4, -9.0]])
    found_pv = where_open(expected_pv, logit_pv)
    assert float(torch.sigmoid(logit_pv[0, 0]) * found_pv[0, 0]) == pytest.approx(0.9)
    assert float(found_pv[0, 1]) == pytest.approx(-0.2 / embeddings.LEAST_SHARE)  # a bound for rare edges
    weight_pvk = torch.ones(1, 2, 3)
    torch.testing.assert_close(where_open(weight_pvk, logit_pv)[0, 1], torch.full((3,), 1 / 0.3))


def test_the_map_finds_whether_a_table_says_anything():
    torch.manual_seed(0)
    seen_p, table_pe = torch.ones(60, dtype=torch.bool), torch.randn(60, 8)
    table_pe = standardised(table_pe, seen_p)
    told_pd = table_pe @ torch.full((8, 1), 3.0) + 0.2 * torch.randn(60, 1)
    noise_pd = torch.randn(60, 1)
    (told_df, _), (noise_df, _) = (embeddings._regression(table_pe, y, seen_p) for y in (told_pd, noise_pd))
    torch.testing.assert_close(told_df[0, :-1], torch.full((8,), 3.0), atol=0.5, rtol=0)
    assert float((table_pe @ noise_df[0, :-1]).std()) < 0.25 * float(noise_pd.std())
    nothing_df, _ = embeddings._regression(table_pe, torch.zeros(60, 1), seen_p)
    assert bool((nothing_df == 0).all())


def test_priors_are_those_of_the_formulas():
    table_pe = standardised(_table(2), SEEN)
    data = {
        "shift_log_scales": torch.tensor([0.3, -0.2]),
        "shift_map": torch.arange(12.0).reshape(4, 3),
        "gate_curve": torch.tensor([-1.0, -2.0, -3.0, 0.0, 0.5]),
    }

    def priors():
        loc_pk, sd = expected_effects("shift", table_pe, (4,), 3.0)
        return loc_pk, sd, expected_gates("gate", loc_pk**2)

    trace = poutine.trace(poutine.condition(priors, data=data)).get_trace()
    trace.compute_log_prob()
    loc_pk, sd, logit_pk = trace.nodes["_RETURN"]["value"]
    map_kf = data["shift_map"]
    torch.testing.assert_close(loc_pk, table_pe @ map_kf[:, :2].T + map_kf[:, 2])
    assert float(sd) == pytest.approx(math.exp(-0.2))
    torch.testing.assert_close(logit_pk, data["gate_curve"][:4] + math.exp(0.5) * loc_pk**2)
    width_f = torch.tensor([math.exp(0.3)] * 2 + [3.0])
    expected = dist.Normal(0.0, width_f).log_prob(map_kf).sum()
    torch.testing.assert_close(trace.nodes["shift_map"]["log_prob_sum"], expected)


def test_guides_leave_the_seen_alone_and_give_the_unseen_their_prior():
    pyro.set_rng_seed(0)
    table_pe, seen_p = standardised(_table(), SEEN), seen_targets(6, (9.0, 9.0, 0.0, 9.0, 9.0, 9.0))
    assert bool((seen_p == SEEN).all()) and bool(seen_targets(2, ()).all())
    open_pk, loc_pk, scale_pk = torch.rand(6, 4), torch.randn(6, 4), torch.rand(6, 4) + 0.1
    effects, gates = EffectMapGuide("shift", seen_p), GateCurveGuide("gate", 4, seen_p)

    def guide():
        mean_pk, sd_pk, expected_pk = effects(table_pe, open_pk, loc_pk, scale_pk)
        return mean_pk, sd_pk, expected_pk, gates(expected_pk**2, loc_pk)

    nodes = poutine.trace(guide).get_trace().nodes
    mean_pk, sd_pk, expected_pk, logit_pk = nodes["_RETURN"]["value"]
    for found, own in ((mean_pk, loc_pk), (sd_pk, scale_pk), (logit_pk, loc_pk)):
        torch.testing.assert_close(found[SEEN], own[SEEN])
    drawn = {name: nodes[name]["value"] for name in ("shift_log_scales", "shift_map", "gate_curve")}

    def model():
        return (*expected_effects("shift", table_pe, (4,), 3.0), expected_gates("gate", expected_pk**2))

    loc_pk, sd, prior_pk = poutine.condition(model, data=drawn)()
    torch.testing.assert_close(mean_pk[2], loc_pk[2])
    torch.testing.assert_close(sd_pk[2], sd.expand(4))
    torch.testing.assert_close(logit_pk[2], prior_pk[2])


def test_size_of_a_change_adds_up_its_parts():
    shift_pv, weight_pvk = torch.tensor([[3.0, 0.0]]), torch.tensor([[[0.0, 0.0], [1.0, 2.0]]])
    found = squared_size([shift_pv, weight_pvk], shift_pv)
    torch.testing.assert_close(found, torch.tensor([[9.0, 5.0]]))


def _described(n_targets: int = 25, noise: float = 0.2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A standardised table, changes of two kinds to six programmes, and which targets are seen.

    Each target changes one or two programmes; the last three targets are not seen.
    """
    generator = torch.Generator().manual_seed(3)
    change_pf = torch.zeros(n_targets, 12)
    for p in range(n_targets):
        for v in {p % 6, int(torch.randint(6, (), generator=generator))}:
            change_pf[p, [v, 6 + v]] = 2 * torch.randn(2, generator=generator) + 0.5
    seen_p = torch.arange(n_targets) < n_targets - 3
    told_pe = change_pf @ torch.randn(12, 14, generator=generator)
    table_pe = told_pe / told_pe.std(0) + noise * torch.randn(n_targets, 14, generator=generator)
    return standardised(table_pe, seen_p), change_pf, seen_p


def test_rows_follow_from_changes_by_the_ridge_of_scikit_learn():
    table_pe, change_pf, seen_p = _described()
    moved_pf = change_pf.clone()
    moved_pf[~seen_p] = 100.0  # never measured: has no say
    found = Reading.of(table_pe, moved_pf, seen_p)
    x_pf, y_pe = change_pf[seen_p].numpy(), table_pe[seen_p].numpy()
    typical_f = np.median(x_pf, 0)
    x_pf = (x_pf - typical_f) / np.sqrt(((x_pf - typical_f) ** 2).mean(0))
    missed = {
        penalty: ((cross_val_predict(Ridge(penalty), x_pf, y_pe, cv=LeaveOneOut()) - y_pe) ** 2).sum()
        for penalty in 10.0 ** np.arange(-3, 3.5, 0.5)
    }
    best = min(missed, key=missed.get)
    assert 1e-3 < best < 1e3
    ridge = Ridge(best).fit(x_pf, y_pe)
    np.testing.assert_allclose(found.map_fe, ridge.coef_.T, rtol=1e-3, atol=1e-4)
    doubt_ff = np.linalg.inv(np.cov(x_pf.T, bias=True) * len(x_pf) + best * np.eye(12))
    np.testing.assert_allclose(found.doubt_ff, doubt_ff, rtol=1e-3, atol=1e-5)
    left = float(((ridge.predict(x_pf) - y_pe) ** 2).mean())
    assert left < float((2 * found.log_noise).exp()) < missed[best] / y_pe.size


def test_few_changes_are_read_off_a_row_where_a_regression_on_it_is_lost():
    table_pe, change_pf, seen_p = _described(40)
    mean_uf, sd_uf = Reading.of(table_pe, change_pf, seen_p).changes(table_pe[~seen_p], 2)
    truth_uf = change_pf[~seen_p]
    ridge_df, _ = embeddings._regression(table_pe, change_pf, seen_p)
    regressed_uf = table_pe[~seen_p] @ ridge_df[:, :-1].T + ridge_df[:, -1]
    missed, plainly = ((found - truth_uf).square().mean().sqrt() for found in (mean_uf, regressed_uf))
    assert float(missed) < 0.65 * float(plainly)
    is_changed_uf = truth_uf != 0
    assert (
        float(mean_uf[~is_changed_uf].abs().mean()) < 0.2 < 0.8 < float(mean_uf[is_changed_uf].abs().mean())
    )
    assert bool((sd_uf > 0).all()) and float(((mean_uf - truth_uf).abs() < 3 * sd_uf).float().mean()) > 0.9


def test_a_table_of_noise_tells_what_a_typical_target_changes():
    """However the coefficients came out by chance: they are known to be unsure."""
    table_pe, change_pf, seen_p = _described()
    change_pf[:, 0] = 1.5 + 0.1 * change_pf[:, 0]  # nearly all targets do this
    change_pf[:, 5] = 0.0  # and nobody this
    others = [f for f in range(12) if f not in (0, 5)]
    told_uf = Reading.of(table_pe, change_pf, seen_p).changes(table_pe[~seen_p], 2)[0]
    assert float(told_uf[:, others].abs().mean()) > 0.5
    for seed in range(5):
        torch.manual_seed(seed)
        noise_pe = standardised(torch.randn_like(table_pe), seen_p)
        mean_uf, sd_uf = Reading.of(noise_pe, change_pf, seen_p).changes(noise_pe[~seen_p], 2)
        assert float((mean_uf[:, 0] - 1.5).abs().max()) < 0.2
        assert bool((mean_uf[:, 5] == 0).all())
        assert float(mean_uf[:, others].abs().mean()) < 0.2
        assert float(sd_uf[:, 1:5].mean()) > 0.5


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_half_of_the_targets_change_is_not_typical(sign):
    change_pf = sign * torch.tensor(
        [[2.0, 1.5, 1.5], [1.0, 0.0, 1.0], [0.0, 0.1, 1.2], [0.0, 0.0, 0.0], [9.0] * 3]
    )
    seen_p = torch.tensor([True, True, True, True, False])
    table_pe = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    found = Reading.of(table_pe, change_pf, seen_p)
    torch.testing.assert_close(found.base_f.float(), sign * torch.tensor([0.0, 0.0, 1.0]))


def test_the_model_scores_the_rows_that_count():
    table_pe, change_pf, seen_p = _described()
    map_fe = torch.randn(13, table_pe.shape[1])
    data = {"table_log_noise": torch.tensor(-1.0), "table_map": map_fe}
    trace = poutine.trace(poutine.condition(described, data=data)).get_trace(table_pe, change_pf, seen_p)
    rows = dist.Normal(change_pf @ map_fe[:-1] + map_fe[-1], math.exp(-1.0))
    expected = rows.log_prob(table_pe)[seen_p].sum()
    trace.compute_log_prob()
    assert float(trace.nodes["table"]["log_prob_sum"]) == pytest.approx(float(expected), rel=1e-5)
    unit = table_pe.shape[1] ** -0.5
    prior = dist.Normal(0.0, unit).log_prob(map_fe).sum()
    assert float(trace.nodes["table_map"]["log_prob_sum"]) == pytest.approx(float(prior), rel=1e-5)


def test_the_guides_map_predicts_the_rows_of_seen_targets():
    table_pe, change_pf, seen_p = _described(noise=0.02)
    change_pf[:, 7] = 0.3  # the same for all: says nothing
    drawn = poutine.trace(DescriptionGuide(seen_p)).get_trace(table_pe, change_pf)
    map_fe = drawn.nodes["table_map"]["fn"].base_dist.loc
    left_pe = (change_pf @ map_fe[:-1] + map_fe[-1] - table_pe)[seen_p]
    assert float(left_pe.square().mean()) < 0.05 * float(table_pe[seen_p].square().mean())
    noise = float(drawn.nodes["table_log_noise"]["fn"].loc.exp())
    assert 0.5 < noise / float(left_pe.std()) < 4
