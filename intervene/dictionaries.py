"""Dictionaries of features that were learned elsewhere: sparse autoencoders."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from intervene.errors import InterveneError, ShapeMismatch
from intervene.featurizers import Featurizer, finite
from intervene.precision import compute_dtype, contiguous, full_precision


class SAE(Featurizer):
    """A sparse autoencoder: reads its latents, writes h + dec(z) - dec(read(h)), so its reconstruction error stays.

    Activation "relu": relu(pre). "jumprelu": pre where pre > threshold, else 0 (Rajamanoharan et al. 2024, arXiv
    2407.14435), pre = (h - b_dec * centred) W_enc + b_enc. Not lossless: two codes may decode to one activation.

    Args:
        encoder: (D, K). decoder: (K, D). encoder_bias: (K,). decoder_bias: (D,). threshold: (K,), for "jumprelu".
        centred: whether decoder_bias is subtracted before encoding (OpenAI, SAELens' apply_b_dec_to_input).

    Raises:
        ShapeMismatch: the shapes do not agree. BadVector: NaN or infinite weights. InterveneError: an activation that
        is neither, "jumprelu" without a threshold, or a threshold that "relu" would ignore.
    """

    lossless = False

    def __init__(
        self,
        encoder: Tensor,
        decoder: Tensor,
        *,
        encoder_bias: Tensor | None = None,
        decoder_bias: Tensor | None = None,
        threshold: Tensor | None = None,
        activation: Literal["relu", "jumprelu"] = "relu",
        centred: bool = False,
    ) -> None:
        super().__init__()
        self._check_activation(activation, threshold)
        if encoder.dim() != 2:
            raise ShapeMismatch(f"SAE encoder of shape {tuple(encoder.shape)}: need (D, K).")
        width, count = encoder.shape
        shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "encoder": (encoder, (width, count)),
            "decoder": (decoder, (count, width)),
            "encoder_bias": (encoder_bias, (count,)),
            "decoder_bias": (decoder_bias, (width,)),
            "threshold": (threshold, (count,)),
        }
        for name, (tensor, shape) in shapes.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ShapeMismatch(f"SAE {name} of shape {tuple(tensor.shape)}: encoder {width}x{count} asks {shape}.")
            if tensor is not None:
                finite(tensor, f"SAE {name}")
        self.activation: str = activation
        self.centred = centred
        self.encoder = _fixed(encoder)
        self.decoder = _fixed(decoder)
        self.encoder_bias = _fixed(encoder.new_zeros(count) if encoder_bias is None else encoder_bias)
        self.decoder_bias = _fixed(encoder.new_zeros(width) if decoder_bias is None else decoder_bias)
        self.threshold = _fixed(encoder.new_zeros(count) if threshold is None else threshold)

    @staticmethod
    def _check_activation(activation: str, threshold: Tensor | None) -> None:
        if activation not in ("relu", "jumprelu"):
            raise InterveneError(f"SAE with activation {activation!r}: there is none. Use 'relu' or 'jumprelu'.")
        if activation == "jumprelu" and threshold is None:
            raise InterveneError("SAE with activation 'jumprelu': no threshold was given. Pass threshold (K,).")
        if activation == "relu" and threshold is not None:
            raise InterveneError(
                "SAE with activation 'relu': a threshold was given, which it has no use for. "
                "Pass activation='jumprelu', or leave the threshold out."
            )

    @property
    def width(self) -> int:
        return self.encoder.shape[0]

    def features(self, width: int) -> int:
        return self.encoder.shape[1]

    def read(self, h: Tensor) -> Tensor:
        wide = h.to(compute_dtype(h))
        if self.centred:
            wide = wide - self.decoder_bias
        with full_precision(h):
            before = wide @ self.encoder.to(wide.dtype) + self.encoder_bias
        if self.activation == "jumprelu":
            return torch.where(before > self.threshold, before, torch.zeros_like(before)).relu()
        return before.relu()

    def decode(self, z: Tensor) -> Tensor:
        """Return the reconstruction (B, P, D) of latents `z` (B, P, K)."""
        wide = z.to(compute_dtype(z))
        with full_precision(z):
            return wide @ self.decoder.to(wide.dtype) + self.decoder_bias

    def write(self, h: Tensor, z: Tensor) -> Tensor:
        dtype = compute_dtype(h)
        with full_precision(h):  # biases cancel; equal codes change nothing
            change = (z.to(dtype) - self.read(h)) @ self.decoder.to(dtype)
        return (h.to(dtype) + change).to(h.dtype)


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(contiguous(tensor.detach().float().clone()), requires_grad=False)
