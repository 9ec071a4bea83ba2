"""Factors: incremental matrix factorisation, of choices and of ratings."""

from __future__ import annotations

import numpy as np
from river import optim, reco

from trainer.baselines.pairs import Floats
from trainer.baselines.ranking import Scores
from trainer.quality import Rows

DIMENSION = 10
INITIAL_SCALE = 0.1
SEED = 71


class _Vectors:
    """Hold a vector per number, drawn when it is first needed."""

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random
        self.values: Floats = np.empty((0, DIMENSION))

    def reserve(self, count: int) -> None:
        if count > len(self.values):
            more = max(count - len(self.values), len(self.values), 1024)
            drawn = self._random.normal(0.0, INITIAL_SCALE, (more, DIMENSION))
            self.values = np.concatenate([self.values, drawn])


class IncrementalFactorisation:
    """ISGD (Vinagre, Jorge and Gama 2014, algorithm 2): each choice moves the user's and the item's vector towards 1.

    Items rank by how near to 1 their product with the user's vector is. The published settings for MovieLens-like
    streams: 10 factors, 10 passes over each choice. An event costs one pass over the items' vectors.
    """

    PASSES = 10
    LEARNING_RATE = 0.01
    REGULARISATION = 0.1

    def __init__(self) -> None:
        random = np.random.default_rng(SEED)
        self._users, self._items = _Vectors(random), _Vectors(random)

    def score(self, user: int, chosen: Rows, scores: Scores) -> None:
        """Write the score of each item; a user without choices has no vector, so that all items score alike."""
        if len(chosen):
            scores[:] = -np.abs(1.0 - self._items.values[: len(scores)] @ self._users.values[user])
        else:
            scores[:] = 0.0

    def learn(self, user: int, item: int, chosen: Rows) -> None:
        """Move both vectors."""
        self._users.reserve(user + 1)
        self._items.reserve(item + 1)
        u, v = self._users.values[user], self._items.values[item]
        rate, kept = self.LEARNING_RATE, 1.0 - self.LEARNING_RATE * self.REGULARISATION
        # All passes stay in the plane of u and v: their coefficients move, and products of u and v give the errors.
        uu, uv, vv = float(u @ u), float(u @ v), float(v @ v)
        a, b, c, d = 1.0, 0.0, 0.0, 1.0
        for _ in range(self.PASSES):
            step = rate * (1.0 - (a * c * uu + (a * d + b * c) * uv + b * d * vv))
            a, b = kept * a + step * c, kept * b + step * d
            # The item's step sees the user's vector already moved, as the paper has it.
            c, d = kept * c + step * a, kept * d + step * b
        self._users.values[user], self._items.values[item] = a * u + b * v, c * u + d * v


class BiasedFactorisation:
    """Predict ratings by river's BiasedMF with the settings of its documentation: mean, biases and ten factors."""

    def __init__(self) -> None:
        self._model = reco.BiasedMF(
            n_factors=DIMENSION,
            bias_optimizer=optim.SGD(0.025),
            latent_optimizer=optim.SGD(0.025),
            latent_initializer=optim.initializers.Normal(mu=0.0, sigma=INITIAL_SCALE, seed=SEED),
            seed=SEED,
        )

    def predict(self, user: int, item: int) -> float:
        """Return the expected value."""
        return float(self._model.predict_one(user, item))  # type: ignore[no-untyped-call]

    def learn(self, user: int, item: int, value: float) -> None:
        """Learn a rating."""
        self._model.learn_one(user, item, value)  # type: ignore[no-untyped-call]
