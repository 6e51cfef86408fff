"""The attribution core: models, concepts, scores, and edits of weights.

Knows nothing of metrics, result folders, Hydra or W&B. Paper: component attribution for
diffusion models (Eq. 3 scores, Eq. 4 erase objective, Eq. 5 amplify objective).
"""
