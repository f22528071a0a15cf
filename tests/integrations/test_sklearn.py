"""Readouts as scikit-learn estimators."""

import pickle

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from cenote.integrations.sklearn import ReadoutClassifier, ReadoutTransformer


@parametrize_with_checks([ReadoutClassifier(), ReadoutTransformer()])
def test_keeps_the_contract_of_scikit_learn(estimator, check):
    check(estimator)


def flagged_tokens(items=240, tokens=12, dim=8, seed=0):
    """One token carries the class beside a flag; the others carry random classes without it."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, items)
    where = rng.integers(0, tokens, items)
    x = 0.3 * rng.standard_normal((items, tokens, dim))
    noise = rng.integers(0, 3, (items, tokens))
    x[np.arange(items)[:, None], np.arange(tokens), noise] += 2
    x[np.arange(items), where, :3] = 2 * np.eye(3)[y]
    x[np.arange(items), where, 3] += 3
    return x.astype(np.float32), np.array(["low", "mid", "high"])[y]


def test_learned_readout_finds_the_flagged_token_that_the_mean_drowns():
    x, y = flagged_tokens()
    tx, ty = flagged_tokens(seed=1)
    mean = ReadoutClassifier("mean").fit(x, y).score(tx, ty)
    learned = ReadoutClassifier("efficient_probing(num_queries=1)", epochs=30).fit(x, y)
    assert learned.score(tx, ty) > 0.95
    assert mean < 0.8
    assert learned.predict_proba(tx[:5]).shape == (5, 3)
    assert list(learned.classes_) == ["high", "low", "mid"]


def test_lists_of_different_lengths_equal_each_item_alone():
    x, y = flagged_tokens(60)
    ragged = [item[: 4 + number % 9] for number, item in enumerate(x)]
    model = ReadoutClassifier("simpool", epochs=3, lrs=[0.01]).fit(ragged, y)
    together = model.predict_proba(ragged)
    alone = np.concatenate([model.predict_proba([item]) for item in ragged])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_lists_of_stacks_of_different_lengths():
    x, y = flagged_tokens(60)
    stack = np.stack([np.random.default_rng(0).standard_normal(x.shape), x], axis=1)
    ragged = [item[:, : 4 + number % 9] for number, item in enumerate(stack)]
    found = ReadoutTransformer("mean_layers > mean").fit(ragged).transform(ragged)
    np.testing.assert_allclose(found, [item.mean(axis=(0, 1)) for item in ragged], atol=1e-5)
    model = ReadoutClassifier("weighted_layers > mean", epochs=2).fit(ragged, y)
    alone = np.concatenate([model.predict_proba([item]) for item in ragged])
    np.testing.assert_allclose(model.predict_proba(ragged), alone, atol=1e-5)


def test_several_layers():
    x, y = flagged_tokens(60)
    stack = np.stack([np.random.default_rng(0).standard_normal(x.shape), x], axis=1)
    model = ReadoutTransformer("weighted_layers > mean", epochs=2).fit(stack, y)
    assert model.transform(stack).shape == (60, 8)
    np.testing.assert_allclose(
        ReadoutTransformer("mean_layers > mean").fit(stack).transform(stack), stack.mean(axis=(1, 2)), atol=1e-5
    )


def test_stands_in_pipelines_and_searches():
    x, y = flagged_tokens(90)
    search = GridSearchCV(
        make_pipeline(ReadoutTransformer(), LogisticRegression()),
        {"readouttransformer__readout": ["mean", "max"]},
        cv=2,
    ).fit(x, y)
    pooled = {"mean": x.mean(axis=1), "max": x.max(axis=1)}[search.best_params_["readouttransformer__readout"]]
    by_hand = LogisticRegression().fit(pooled, y)
    np.testing.assert_allclose(search.predict_proba(x), by_hand.predict_proba(pooled), atol=1e-3)
    assert list(search.best_estimator_[0].get_feature_names_out()[:2]) == ["readouttransformer0", "readouttransformer1"]


def test_same_seed_same_numbers_and_pickles():
    x, y = flagged_tokens(60)
    one, two = (ReadoutClassifier("ep(num_queries=2)", epochs=2).fit(x, y) for _ in range(2))
    np.testing.assert_array_equal(one.decision_function(x), two.decision_function(x))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(one)).decision_function(x), one.decision_function(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: ReadoutTransformer("simpool").fit(x), "requires y"),
        (lambda x, y: ReadoutClassifier("simpol").fit(x, y), "did you mean"),
        (lambda x, y: ReadoutClassifier().fit(x, y[:-1]), "inconsistent"),
        (lambda x, y: ReadoutClassifier().fit(x[None, None], y), "X must be"),
        (lambda x, y: ReadoutClassifier().fit([x[0], x[1][:, :3]], y[:2]), "one width"),
        (lambda x, y: ReadoutClassifier().fit([x[:2], x[2:5]], y[:2]), "equally many layers, got .2, 3."),
        (lambda x, y: ReadoutClassifier().fit(x, y).predict(x[..., :3]), "expecting 8 features"),
        (lambda x, y: ReadoutClassifier().fit(np.where(x > 2, np.nan, x), y), "finite"),
        (lambda x, y: ReadoutClassifier(validation_fraction=2).fit(x, y), "validation_fraction"),
    ],
)
def test_bad_input_is_refused(call, message):
    x, y = flagged_tokens(30)
    with pytest.raises(ValueError, match=message):
        call(x, y)
