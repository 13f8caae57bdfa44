"""PCA against scikit-learn, sparse autoencoders against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from intervene import PCA, SAE, BadVector, InterveneError, ShapeMismatch
from tests.intervene.values import D, K, frame, randn, sae

# PCA


def test_pca_is_scikit_learns():
    from sklearn.decomposition import PCA as Reference

    data = randn(60, D, seed=9) @ torch.diag(torch.arange(1.0, D + 1)) + 5
    lens, reference = PCA.fit(data, K), Reference(K, svd_solver="full").fit(data.double().numpy())
    signs = np.sign((lens.components.double().numpy() * reference.components_.T).sum(0))
    np.testing.assert_allclose(lens.components.numpy() * signs, reference.components_.T, atol=1e-5)
    np.testing.assert_allclose(lens.mean.numpy(), reference.mean_, atol=1e-5)
    scores = lens.read(data[None])[0].numpy() * signs
    np.testing.assert_allclose(scores, reference.transform(data.double().numpy()), atol=1e-4)
    assert (lens.components.gather(0, lens.components.abs().argmax(0, keepdim=True)) > 0).all()


def test_writing_zero_scores_puts_the_mean_in_the_subspace():
    data = randn(60, D, seed=9) + 5
    lens, h = PCA.fit(data, K), randn(1, 1, D)
    q = lens.components
    written = lens.write(h, torch.zeros(1, 1, K))
    torch.testing.assert_close(written, h + (lens.mean - h) @ q @ q.mT, atol=1e-5, rtol=0)


def test_a_pca_that_cannot_be_is_refused():
    with pytest.raises(ShapeMismatch, match=r"PCA of rank 5 from activations \(5, 12\)"):
        PCA.fit(randn(5, D), 5)
    with pytest.raises(BadVector, match="PCA activations: it has NaN"):
        PCA.fit(torch.full((9, D), torch.nan), 2)
    with pytest.raises(ShapeMismatch, match=r"PCA mean of shape \(3,\)"):
        PCA(torch.zeros(3), frame())
    with pytest.raises(BadVector, match="PCA mean"):
        PCA(torch.full((D,), torch.inf), frame())


# SAE


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_an_sae_reads_its_formula(activation, centred):
    lens, h = sae(activation, centred=centred), randn(1, 2, D)
    x = h.double().numpy() - centred * lens.decoder_bias.double().numpy()
    before = x @ lens.encoder.double().numpy() + lens.encoder_bias.double().numpy()
    cut = lens.threshold.double().numpy() if activation == "jumprelu" else 0.0
    wanted = np.where(before > cut, before, 0.0)
    np.testing.assert_allclose(lens.read(h).numpy(), wanted, atol=1e-5)
    assert 0.1 < (wanted > 0).mean() < 0.9, "some latents are on and some off"
    decoded = wanted @ lens.decoder.double().numpy() + lens.decoder_bias.double().numpy()
    np.testing.assert_allclose(lens.decode(lens.read(h)).numpy(), decoded, atol=1e-4)


def test_jumprelu_at_its_threshold_by_hand():
    lens = SAE(torch.ones(1, 3), torch.ones(3, 1), threshold=torch.tensor([1.0, 2.0, -1.0]), activation="jumprelu")
    assert lens.read(torch.tensor([[[2.0]]])).tolist() == [[[2.0, 0.0, 2.0]]]  # strictly above
    assert lens.read(torch.tensor([[[-0.5]]])).tolist() == [[[0.0, 0.0, 0.0]]]  # never negative


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_an_sae_swap_keeps_the_reconstruction_error(activation):
    lens, h, s = sae(activation), randn(2, 3, D), randn(2, 3, D, seed=4)
    error = h - lens.decode(lens.read(h))
    assert error.abs().max() > 0.5
    written = lens.write(h, lens.read(s))
    torch.testing.assert_close(written, lens.decode(lens.read(s)) + error, atol=1e-4, rtol=0)


def test_one_latent_moves_h_along_its_decoder_row():
    lens, h = sae(), randn(1, 1, D)
    z = lens.read(h).clone()
    z[..., 7] += 2.5
    torch.testing.assert_close(lens.write(h, z), h + 2.5 * lens.decoder[7], atol=1e-5, rtol=0)


def test_bf16_latents_are_decoded_by_the_fp32_dictionary():
    lens, z = sae(), randn(1, 1, 20).relu().bfloat16()
    torch.testing.assert_close(lens.decode(z), z.float() @ lens.decoder + lens.decoder_bias, atol=1e-5, rtol=0)


def test_an_sae_that_does_not_fit_together_is_refused():
    with pytest.raises(ShapeMismatch, match=r"SAE decoder of shape \(12, 20\): encoder 12x20 asks \(20, 12\)"):
        SAE(randn(D, 20), randn(D, 20))
    with pytest.raises(ShapeMismatch, match="SAE encoder_bias"):
        SAE(randn(D, 20), randn(20, D), encoder_bias=randn(D))
    with pytest.raises(ShapeMismatch, match=r"SAE encoder of shape \(12,\)"):
        SAE(randn(D), randn(20, D))
    with pytest.raises(InterveneError, match="no threshold was given"):
        SAE(randn(D, 20), randn(20, D), activation="jumprelu")
    with pytest.raises(InterveneError, match="a threshold was given, which it has no use for"):
        SAE(randn(D, 20), randn(20, D), threshold=randn(20))
    with pytest.raises(InterveneError, match="activation 'topk': there is none"):
        SAE(randn(D, 20), randn(20, D), activation="topk")
    with pytest.raises(BadVector, match="SAE decoder: it has NaN"):
        SAE(randn(D, 20), torch.full((20, D), torch.nan))
