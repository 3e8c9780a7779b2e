"""Train, save and read TopK autoencoders with sae-lens, which is imported here only, and lazily (it is slow to import).

Recipe: activations come from our own iterator; the scale is normalised to sqrt(D) and folded back at the end; the
decoder bias starts at the mean (the library leaves it 0, which leaves most latents dead in a short run); dead latents
are counted over a window that fits the run. Architecture: Gao et al. 2024, "Scaling and evaluating sparse
autoencoders".
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core.cache import reading, write_json
from cwac_lab.core.errors import QualityError, in_range
from cwac_lab.core.progress import Meter

REPORT = "quality.json"


@dataclass
class SAEConfig:
    """The ``sae`` group.

    Attributes:
        n_latents: Dictionary size F.
        k: Latents active per token.
        n_tokens: Tokens of activations to collect; one whose whole context was met before is not counted.
        harmful_share: Share of them from refused harmful prompts (the paper: 0.7).
        steps: Optimizer steps.
        batch_size: Activations per step.
        learning_rate: Peak of Adam's learning rate; it decays to a tenth over the last fifth.
        held_out: Share of conversations kept for measuring quality.
        min_explained_variance: Held-out explained variance under which a run stops with an error.
        seed: Seed of the draw, the initial weights and the order.
    """

    n_latents: int = 4608
    k: int = 32
    n_tokens: int = 20000
    harmful_share: float = 0.7
    steps: int = 200
    batch_size: int = 1024
    learning_rate: float = 1e-3
    held_out: float = 0.2
    min_explained_variance: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        for key in ("n_latents", "k", "n_tokens", "steps", "batch_size"):
            in_range(key, getattr(self, key), 1)
        in_range("k", self.k, 1, self.n_latents)
        in_range("harmful_share", self.harmful_share, 0, 1)
        in_range("learning_rate", self.learning_rate, 0, open_low=True)
        in_range("held_out", self.held_out, 0.01, 0.9)


def _endless(data: Float[Tensor, "N D"], batch_size: int, seed: int) -> Iterator[Float[Tensor, "B D"]]:
    """Yield shuffled batches of shape (B, D) for ever."""
    source = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data), generator=source)
        for begin in range(0, max(1, len(data) - batch_size + 1), batch_size):
            yield data[order[begin : begin + batch_size]]


def _counted(batches: Iterator[Float[Tensor, "B D"]], meter: Meter) -> Iterator[Float[Tensor, "B D"]]:
    for batch in batches:
        yield batch
        meter.advance()


def quality(sae: Any, x: Float[Tensor, "N D"]) -> dict[str, float]:
    """Return explained variance, fraction of variance unexplained, mean L0 and share of dead latents on data.

    Args:
        sae: An autoencoder with ``encode`` and ``decode``.
        x: Activations of shape (N, D) that it was not trained on.
    """
    with torch.no_grad():
        codes = sae.encode(x)
        error = (x - sae.decode(codes)).square().sum()
        unexplained = float(error / (x - x.mean(0)).square().sum())
    active = codes > 0
    return {
        "explained_variance": 1 - unexplained,
        "fraction_variance_unexplained": unexplained,
        "l0": float(active.sum(-1).float().mean()),
        "dead_share": float((~active.any(0)).float().mean()),
        "n": len(x),
    }


def _settings(config: SAEConfig, batch_size: int) -> Any:
    from sae_lens.config import SAETrainerConfig

    return SAETrainerConfig(
        total_training_samples=config.steps * batch_size,
        train_batch_size_samples=batch_size,
        lr=config.learning_rate,
        lr_end=config.learning_rate / 10,
        lr_warm_up_steps=min(10, config.steps // 10),
        lr_decay_steps=config.steps // 5,
        dead_feature_window=max(2, config.steps // 4),
        n_batches_for_norm_estimate=min(10, config.steps),
        n_checkpoints=0,
        save_final_checkpoint=False,
        checkpoint_path=None,
        device="cpu",
    )


def train(
    data: Float[Tensor, "N D"], held_out: Float[Tensor, "M D"], config: SAEConfig, hook_name: str, folder: Path,
    facts: dict[str, float] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train a TopK autoencoder on activations and save it for inference.

    Args:
        data: Activations of shape (N, D) without sink tokens.
        held_out: Activations of shape (M, D) of other conversations.
        config: Settings.
        hook_name: Name of the hooked module, for the file's metadata.
        folder: Where sae-lens writes ``cfg.json`` and ``sae_weights.safetensors``, and ``REPORT`` is written.
        facts: About the activations, for the report.

    Returns:
        The report: quality on the held-out activations, and the facts.

    Raises:
        QualityError: If the held-out explained variance is below ``config.min_explained_variance``, or there are too
            few activations to tell.
    """
    for name, x in (("training", data), ("held-out", held_out)):
        if len(x) < 2:
            raise QualityError(f"{len(x)} {name} activations at {hook_name}; accepted: >= 2 (raise sae.n_tokens)")
    with _quiet():
        from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.saes.sae import SAEMetadata

    width, mean = data.shape[1], data.mean(0)
    scale = width**0.5 / data.norm(dim=-1).mean()
    batch_size = min(config.batch_size, len(data))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=width,
                d_sae=config.n_latents,
                k=config.k,
                normalize_activations="expected_average_only_in",
                metadata=SAEMetadata(hook_name=hook_name),
            )
        )
        sae.b_dec.data.copy_(mean * scale)
        # Some further batches estimate the norm of the activations.
        with Meter("training the autoencoder, steps", config.steps + min(10, config.steps)) as meter, _quiet():
            sae = SAETrainer(
                cfg=_settings(config, batch_size), sae=sae,
                data_provider=_counted(_endless(data, batch_size, config.seed), meter),
            ).fit()  # fmt: skip
    sae.save_inference_model(str(folder))
    report = quality(load(folder), held_out) | (facts or {})
    if not report["explained_variance"] >= config.min_explained_variance:  # nor is NaN
        raise QualityError(
            f"the autoencoder at {hook_name} explains {report['explained_variance']:.2f} of the held-out variance; "
            f"accepted: >= sae.min_explained_variance={config.min_explained_variance} (raise sae.steps or sae.n_tokens,"
            f" or lower sae.learning_rate={config.learning_rate:g})"
        )
    write_json(folder / REPORT, report)
    return report


def load(folder: Path) -> Any:
    """Load an autoencoder from a folder, frozen.

    Raises:
        LabError: If it is damaged.
    """
    with _quiet():
        from sae_lens import SAE
    with _quiet(), reading(folder):
        return SAE.load_from_disk(str(folder), device="cpu").eval().requires_grad_(False)


def encoder(folder: Path) -> tuple[Float[Tensor, "D F"], Float[Tensor, " F"], int]:
    """Return a TopK encoder as one affine map: weight of shape (D, F), bias of shape (F,), and k.

    ``x @ weight + bias`` is the pre-activation by which sae-lens selects: decoder bias and decoder norms folded in.
    """
    sae = load(folder)
    if sae.cfg.architecture() != "topk" or sae.cfg.normalize_activations != "none":
        raise QualityError(f"autoencoder in {folder.name}: a TopK one with folded normalisation is needed")
    weight, bias = sae.W_enc, sae.b_enc
    if sae.cfg.apply_b_dec_to_input:
        bias = bias - sae.b_dec @ weight
    if sae.cfg.rescale_acts_by_decoder_norm:
        norms = sae.W_dec.norm(dim=-1)
        weight, bias = weight * norms, bias * norms
    return weight.clone().contiguous(), bias.clone().contiguous(), int(sae.cfg.k)


def decoder_directions(folder: Path) -> Float[Tensor, "F D"]:
    """Return the decoder's directions, one row of shape (D,) a latent."""
    return load(folder).W_dec.clone()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's progress output: stages are logged by this project."""
    import io
    import warnings

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
