"""Guide a model's pictures by the model's own earlier weights (autoguidance).

Guidance goes from a weak prediction to a better one, and further. In the stock pipeline, the weak one is the model's for
the empty prompt. That leads to what is typical of a prompt, so that pictures resemble each other. With a guide, the weak
one comes from earlier weights that know half of the prompt: its text embeddings are the mean of those of the prompt and
of the empty one. Source: Karras et al., 2024, arXiv:2406.02507, whose guide knows all of the prompt. With half of it,
more pictures show what they should (benchmarks/results/guides.md).

The earlier weights lie in `guide/` of a pipeline folder. Stock diffusers does not use them.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from t2i import models
from t2i.runs import GUIDE


class GuidedUnet(torch.nn.Module):
    """A UNet and its guide, which the stock pipeline calls as one UNet.

    In a batch of a guided step, the pipeline repeats the noisy latents: the first half is for the empty or negative prompt,
    the second for the prompt. Inside `guiding`, the guide predicts the first half. Everywhere else the UNet predicts both,
    as in the stock pipeline.
    """

    def __init__(self, unet: Any, guide: Any):
        super().__init__()
        self.unet, self.guide = unet, guide
        self.pipeline: StableDiffusionPipeline | None = None  # The pipeline that draws now, inside `guiding`.
        # The last hidden states, those of the prompts, and the means of these and of the empty prompt's.
        self.given = self.texts = self.half_texts = torch.empty(0)

    @property
    def config(self) -> Any:
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def forward(self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, **options: Any) -> Any:
        if self.pipeline is None or not self.pipeline.do_classifier_free_guidance:
            return self.unet(sample, timestep, encoder_hidden_states=encoder_hidden_states, **options)
        if self.given is not encoder_hidden_states:  # A compiled UNet knows the pictures of a batch by this tensor.
            negative, self.texts = encoder_hidden_states.chunk(2)
            self.given, self.half_texts = encoder_hidden_states, (negative + self.texts) / 2
        options["return_dict"] = False
        first, second = sample.chunk(2)
        weak = self.guide(first, timestep, encoder_hidden_states=self.half_texts, **options)[0]
        return (torch.cat([weak, self.unet(second, timestep, encoder_hidden_states=self.texts, **options)[0]]),)


def attach(pipeline: StableDiffusionPipeline, guide: Any) -> StableDiffusionPipeline:
    """Return the pipeline with `guide` beside its UNet. Without a guide (None), the pipeline stays as it is."""
    if guide is not None:
        pipeline.unet = GuidedUnet(pipeline.unet, guide.eval())
        for model in (pipeline.unet.unet, guide):
            if hasattr(model, "pairs"):  # A compiled UNet takes two rows of equal noise for one picture.
                model.pairs = False
    return pipeline


def unguided(unet: Any) -> Any:
    """Return the UNet of a pipeline without its guide."""
    return unet.unet if isinstance(unet, GuidedUnet) else unet


def guide_of(unet: Any) -> Any:
    """Return the guide of a pipeline's UNet, or None."""
    return unet.guide if isinstance(unet, GuidedUnet) else None


def guide_hash(unet: Any) -> str | None:
    """Return `models.hash_model` of the guide of a pipeline's UNet, which is the same for every engine; None without one."""
    guide = guide_of(unet)
    return guide and (getattr(guide, "weights_hash", None) or models.hash_model(guide))


@contextmanager
def guiding(pipeline: StableDiffusionPipeline) -> Iterator[None]:
    """Let the guide of a pipeline, if it has one, take part in what the pipeline draws."""
    unet = pipeline.unet
    if not isinstance(unet, GuidedUnet):
        yield
        return
    unet.pipeline = pipeline
    try:
        yield
    finally:
        unet.pipeline = None


def load_guide(folder: Path | None) -> UNet2DConditionModel | None:
    """Load the guide in `folder`, from `runs.guide_folder`. Without a folder there is none."""
    return models.load_part(UNet2DConditionModel, str(folder), GUIDE).float() if folder else None


def download_guide(repo_id: str, revision: str | None) -> UNet2DConditionModel | None:
    """Load the guide of a pipeline on the Hub, or return None if the pipeline has none."""
    file = f"{GUIDE}/config.json"
    try:
        hf_hub_download(repo_id, file, revision=revision)
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError:  # The Hub cannot be asked. The local cache knows which files did not exist before.
        if isinstance(try_to_load_from_cache(repo_id, file, revision=revision), str | None):
            print(f"WARNING: {repo_id} is drawn without a guide, as the Hub cannot be asked for one", file=sys.stderr)
        return None
    return models.load_part(UNet2DConditionModel, repo_id, GUIDE, revision).float()
