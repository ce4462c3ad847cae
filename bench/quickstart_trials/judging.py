"""The classifier of bench/eight_styles, asked about drawings of the quickstart's style."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from aclora_core.evaluation import label_ranks, share_within, style_share
from bench.eight_styles.features import TinyBaseFeatures
from bench.eight_styles.images import INDEX, read_judge
from bench.eight_styles.judging import load_classifier, train_classifier
from bench.eight_styles.worker import CLASSIFIER
from tools.tiny_base.example_pictures import STYLE


class IconJudge:
    """Names the things and the styles of drawings.

    Args:
        data: the file of bench/eight_styles; the classifier is kept beside it.
        steps, coarse, batch: of the classifier's training, if it has not been trained.
    """

    def __init__(self, data: Path, steps: int, coarse: int, batch: int) -> None:
        with zipfile.ZipFile(data) as archive:
            index = json.loads(archive.read(INDEX))
        self.names, self.style = list(index["names"]), index["style_names"].index(STYLE)
        path = data.with_suffix(CLASSIFIER)
        if not path.is_file():
            found = train_classifier(read_judge(data), path, steps, coarse=coarse, batch=batch)
            print(f"the classifier finds {found:.3f} of the concepts of real images among five", flush=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.look = TinyBaseFeatures(load_classifier(path, device))

    def measures(self, images: Tensor, concepts: Sequence[str]) -> dict[str, float]:
        """Return the shares of images (n, h, w, 3), in 0..1, that are taken for the style and for their concepts."""
        found = self.look(images)
        assert found.style_logits is not None and found.concept_logits is not None
        ranks = label_ranks(found.concept_logits, torch.tensor([self.names.index(concept) for concept in concepts]))
        return {
            "style": style_share(found.style_logits, self.style),
            "concept_in_five": share_within(ranks, 5),
            "concept": share_within(ranks, 1),
        }
