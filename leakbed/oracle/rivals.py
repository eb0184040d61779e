"""Names of what stands beside an attack's guess without reading its messages, and what it knows.

They stand apart from the scores, so that an edit of a metric leaves the guesses of rivals as they
are.
"""

RANDOM_SIGNS, UNTRAINED_SHADOW, SUBSTITUTE = "random-signs", "untrained-shadow", "substitute"
ORACLE_SHADOW, TRUE_FEATURES, WHITE_BOX = "oracle-shadow", "true-features", "white-box"

NEEDS_TRUTH = frozenset({"nearest-public", "real-images", ORACLE_SHADOW, TRUE_FEATURES, WHITE_BOX})
"""Baselines that read the truth to choose their guess; never the best evidence-free one.

Those of altered inputs are bounds: a shadow that was told what the node's images send, the node's
own layers in the shadow's place, and the whole network with the true labels.
"""

OWN_CLASSIFIER, OWN_NEAREST = "own-inputs-classifier", "own-inputs-nearest"
PUBLIC_CLASSIFIER, PUBLIC_NEAREST = "public-label-classifier", "public-label-nearest"
UNTRAINED = "untrained-bottom"

SEES_SAMPLES = frozenset(
    {OWN_CLASSIFIER, OWN_NEAREST, PUBLIC_CLASSIFIER, PUBLIC_NEAREST, UNTRAINED}
)
"""Baselines that look at the attacked samples, though at none of their messages.

They count for the skill. The negative control leaves them out: it holds an attack's guess against
samples it was not made from, which must not score as if it had seen them.
"""
