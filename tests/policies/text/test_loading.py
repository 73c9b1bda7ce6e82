"""Models and tokenizers from folders and GGUF files; what is no causal language model is refused in words."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
)

from dar.assembly.loop import build_loop
from dar.config.model import LoraSpec, ModelSpec
from dar.config.recipe import load_recipe
from dar.errors import ConfigError
from dar.policies.text.loading import (
    add_lora,
    disable_dropout,
    eos_token_ids,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    resolve_model,
)
from dar.reward_model.classifier import load_classifier, load_classifier_config, make_classifier


def refusal(loader: Any, path: Path | str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        loader(ModelSpec(path=str(path), **settings))
    return str(caught.value)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_folder_is_loaded_as_it_was_saved(tiny_folder: Path):
    spec = ModelSpec(path=str(tiny_folder))
    loaded, saved = load_model(spec), make_model()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert load_config(spec).vocab_size == 261
    assert load_tokenizer(spec)("say a")["input_ids"] == make_tokenizer()("say a")["input_ids"]


def test_home_folder_is_expanded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert resolve_model(ModelSpec(path=f"~/{tiny_folder.name}")) == str(tiny_folder)


def test_weights_are_fp32_whatever_was_saved(tmp_path: Path):
    make_model().bfloat16().save_pretrained(tmp_path)
    loaded = load_model(ModelSpec(path=str(tmp_path)))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("loader", [load_config, load_model, load_tokenizer])
def test_path_that_does_not_exist_is_refused(tmp_path: Path, loader: Any):
    assert refusal(loader, tmp_path / "absent") == f"the model path {tmp_path / 'absent'} does not exist"


def test_hub_model_that_cannot_be_had_asks_about_name_and_network():
    message = refusal(load_model, "no-such-organisation/no-such-model")
    assert message == (
        "the model path no-such-organisation/no-such-model does not exist: there is no no-such-organisation, and the "
        "Hub, where it may be, cannot be reached (HF_HUB_OFFLINE is honoured)"
    )


def test_run_folder_stands_for_its_model(tiny_folder: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"run is the folder of a run that has no model yet .* or name .*/run/best"):
        resolve_model(ModelSpec(path=str(tmp_path / "run")))
    (tmp_path / "run" / "model").symlink_to(tiny_folder)
    assert resolve_model(ModelSpec(path=str(tmp_path / "run"))) == str(tmp_path / "run" / "model")


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "no-such-architecture"}', "{"])
@pytest.mark.parametrize("loader", [load_config, load_model])
def test_folder_that_is_no_model_is_refused_in_one_line(tmp_path: Path, config: str | None, loader: Any):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    message = refusal(loader, tmp_path)
    assert message.startswith(f"no causal language model can be loaded from {tmp_path}: ")
    assert "\n" not in message


def test_model_that_is_not_causal_is_refused(tmp_path: Path):
    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    message = refusal(load_model, tmp_path)
    assert message.startswith(f"no causal language model can be loaded from {tmp_path}: ")
    assert "T5Config" in message


def test_model_without_a_language_head_is_refused(tmp_path: Path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    assert "lm_head" in refusal(load_model, tmp_path)


def test_damaged_weights_are_refused(tiny_folder: Path):
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refusal(load_model, tiny_folder)
    assert message.startswith(f"no causal language model can be loaded from {tiny_folder}: SafetensorError: ")


def test_weights_of_other_shapes_are_refused(tiny_folder: Path):
    weights = load_file(tiny_folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    assert "no causal language model can be loaded" in refusal(load_model, tiny_folder)


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path):
    make_model().save_pretrained(tmp_path)
    assert refusal(load_tokenizer, tmp_path).startswith(f"no tokenizer can be loaded from {tmp_path}: ")


def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(tmp_path: Path):
    marker = tmp_path / "it-ran"
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise RuntimeError('ran')\n")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    message = refusal(load_model, tmp_path)
    assert message.endswith("It comes with its own Python code: read it, then set model.trust_remote_code: true.")
    assert not marker.exists()


def test_digest_is_for_gguf_files(tiny_folder: Path):
    assert refusal(resolve_model, tiny_folder, sha256="ab") == (
        "model.sha256 is for .gguf files; pin a Hub model with model.revision"
    )


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_is_off_even_while_training(tmp_path: Path):
    config = GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.5, embd_pdrop=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_model(ModelSpec(path=str(tmp_path))).train()
    ids = torch.arange(8).unsqueeze(0)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_dropout_of_attention_is_off():
    model = make_model(attention_dropout=0.5).train()
    ids = torch.arange(8).unsqueeze(0)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_dropout_of_an_adapter_is_off():
    given = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
    wrapped = add_lora(make_model(), given)
    assert not [module for module in wrapped.modules() if isinstance(module, nn.Dropout) and module.p > 0]


# --- adapters --------------------------------------------------------------------------------------------------------


def test_adapter_names_a_base_given_by_a_relative_path_so_that_it_is_found_elsewhere(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tiny_folder.parent)
    wrapped = add_lora(load_model(ModelSpec(path="tiny-model")), LoraSpec(rank=2))
    assert wrapped.peft_config["default"].base_model_name_or_path == str(tiny_folder)


def test_adapter_has_the_rank_and_scale_of_its_spec():
    wrapped = add_lora(make_model(), LoraSpec(rank=3, alpha=6.0, target_modules=["q_proj"]))
    trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".q_proj.lora_" in name and 3 in parameter.shape for name, parameter in trainable.items())
    # The adapter adds (alpha / rank)·BA: with B = 1 and A = 1/32 every output of q_proj grows by 2·rank·mean(input).
    layer: Any = wrapped.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    before = layer(states)
    nn.init.ones_(layer.lora_B["default"].weight)
    nn.init.constant_(layer.lora_A["default"].weight, 1 / 32)
    grown = (2.0 * 3 * states.mean(1, keepdim=True)).expand_as(before)
    torch.testing.assert_close(layer(states) - before, grown, rtol=1e-4, atol=1e-4)


def test_adapter_leaves_the_model_as_it_is_at_first():
    ids = torch.arange(8).unsqueeze(0)
    expected = make_model()(ids).logits
    assert torch.equal(add_lora(make_model(), LoraSpec(rank=2))(ids).logits, expected)


def test_adapter_for_modules_that_are_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"model\.lora cannot be applied to LlamaForCausalLM: .*'no_proj'"):
        add_lora(make_model(), LoraSpec(target_modules=["no_proj"]))


# --- the end of a completion -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_generation", "of_tokenizer", "expected"),
    [
        (0, "<eos>", (0,)),
        (5, "<eos>", (0, 5)),
        ([7, 5], None, (7, 5)),
        (None, "<eos>", (0,)),
        ([0, 9], "<eos>", (0, 9)),
    ],
)
def test_every_known_end_token_ends_a_completion(
    of_generation: Any, of_tokenizer: str | None, expected: tuple[int, ...]
):
    model, tokenizer = make_model(), make_tokenizer()
    model.generation_config.eos_token_id = of_generation
    tokenizer.eos_token = of_tokenizer
    assert eos_token_ids(model.generation_config, tokenizer) == expected


def test_model_without_an_end_token_is_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"the model has no end-of-sequence token.*Set tokenizer\.eos_token"):
        eos_token_ids(model.generation_config, tokenizer)


# --- GGUF ------------------------------------------------------------------------------------------------------------

# llama.cpp's names for the parts of a layer, by transformers' names.
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring dimensions where transformers rotates halves, so it stores rows reordered."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """The tiny Llama and its tokenizer as an unquantised GGUF file."""
    config, tokenizer = model.config, make_tokenizer()
    assert config.num_key_value_heads is not None
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(token for token, _ in vocabulary), "he"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 5 + [gguf.TokenType.NORMAL] * (len(vocabulary) - 4))
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_pad_token_id(1)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{a}.weight": f"blk.{layer}.{b}.weight" for a, b in GGUF_NAMES.items()}
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if "q_proj" in name:
            weight = interleaved(weight, config.num_attention_heads)
        elif "k_proj" in name:
            weight = interleaved(weight, config.num_key_value_heads)
        writer.add_tensor(names[name], np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted models."""
    monkeypatch.setenv("DAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", make_model(vocab_size=262, tie_word_embeddings=False))
    return tmp_path / "tiny.gguf"


def test_gguf_file_gives_the_model_it_was_made_from(gguf_file: Path, cache: Path):
    spec = ModelSpec(path=str(gguf_file), sha256=hashlib.sha256(gguf_file.read_bytes()).hexdigest().upper())
    ids = torch.arange(20).unsqueeze(0)
    expected = make_model(vocab_size=262, tie_word_embeddings=False)(ids).logits
    torch.testing.assert_close(load_model(spec)(ids).logits, expected, rtol=1e-6, atol=1e-6)
    tokenizer = load_tokenizer(spec)
    assert tokenizer.decode(tokenizer("say he")["input_ids"]) == "say he"
    assert tokenizer.eos_token == "<eos>"


def test_converting_a_gguf_file_makes_no_noise_and_its_errors_are_said(
    gguf_file: Path, cache: Path, capfd: pytest.CaptureFixture[str]
):
    resolve_model(ModelSpec(path=str(gguf_file)))
    assert capfd.readouterr() == ("", "")
    gguf_file.write_bytes(gguf_file.read_bytes()[:4096])
    with pytest.raises(ConfigError, match=r"tiny\.gguf cannot be read as a GGUF language model: error: unpack_from"):
        resolve_model(ModelSpec(path=str(gguf_file)))


def test_gguf_file_is_converted_once_and_again_when_it_changes(gguf_file: Path, cache: Path):
    spec = ModelSpec(path=str(gguf_file))
    folder = Path(resolve_model(spec))
    assert folder.parent == cache / "gguf"
    (folder / "kept").touch()
    assert Path(resolve_model(spec)) == folder
    assert (folder / "kept").exists()
    write_gguf(gguf_file, make_model(seed=1, vocab_size=262, tie_word_embeddings=False))
    assert Path(resolve_model(spec)) != folder
    assert [entry.name for entry in (cache / "gguf").iterdir() if entry.name.startswith(".")] == []


def test_a_start_of_a_run_reads_a_gguf_file_for_its_digest_once(
    gguf_file: Path, cache: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch
):
    digest, read = hashlib.file_digest, []

    def counting(stream: Any, kind: Any) -> Any:
        read.append(stream.name)
        return digest(stream, kind)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    prompts = gguf_file.with_name("plain.jsonl")
    prompts.write_text('{"prompt": "say a"}\n' * 2)
    build_loop(load_recipe(write_recipe(model=str(gguf_file), data=str(prompts))), quiet=True)
    assert read.count(str(gguf_file)) == 1


def test_gguf_file_with_another_digest_is_refused(gguf_file: Path, cache: Path):
    message = refusal(resolve_model, gguf_file, sha256="0" * 64)
    assert f"{gguf_file} ({os.path.getsize(gguf_file):,} bytes) is not the expected file: its SHA-256 is " in message
    assert f"expected {'0' * 64}" in message
    assert not cache.exists()


def test_missing_gguf_file_is_refused(tmp_path: Path, cache: Path):
    assert refusal(load_model, tmp_path / "absent.gguf").startswith(
        f"cannot read the model file {tmp_path / 'absent.gguf'}: [Errno 2] No such file"
    )


def test_file_that_is_no_gguf_is_refused_and_leaves_nothing_behind(tmp_path: Path, cache: Path):
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    assert refusal(load_model, tmp_path / "junk.gguf").startswith(
        f"{tmp_path / 'junk.gguf'} cannot be read as a GGUF language model: "
    )
    assert list((cache / "gguf").iterdir()) == []


def test_cache_that_cannot_be_written_is_refused(gguf_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DAR_CACHE", str(gguf_file))  # a folder below a file cannot be made, even by root
    assert refusal(load_model, gguf_file).startswith(f"cannot write the model cache {gguf_file}/gguf: ")


def test_home_folder_of_a_gguf_file_is_expanded(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(gguf_file.parent))
    assert Path(resolve_model(ModelSpec(path=f"~/{gguf_file.name}"))).parent == cache / "gguf"


# --- adapters' folders -----------------------------------------------------------------------------------------------


def adapter_on(base: Path, folder: Path, *, task: str = "CAUSAL_LM", **changes: Any) -> Path:
    """A folder with a trained adapter alone, as peft saves it."""
    loaded = load_model(ModelSpec(path=str(base)))
    if task == "SEQ_CLS":
        loaded = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    config = LoraConfig(
        **{"r": 2, "target_modules": ["q_proj"], "task_type": task, "init_lora_weights": False} | changes
    )
    torch.manual_seed(len(folder.name))
    get_peft_model(loaded, config).save_pretrained(str(folder))
    return folder


def rewritten(folder: Path, name: str, **changes: Any) -> Path:
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))
    return folder


def test_everything_is_followed_from_an_adapter_to_its_base(tmp_path: Path, tiny_folder: Path):
    rewritten(tiny_folder, "generation_config.json", eos_token_id=[0, 9])
    first = adapter_on(tiny_folder, tmp_path / "first")
    spec = ModelSpec(path=str(adapter_on(first, tmp_path / "on-top")))
    assert load_generation_config(spec).eos_token_id == [0, 9]
    assert load_model(spec).generation_config.eos_token_id == [0, 9]
    assert load_config(spec).max_position_embeddings == 256
    assert load_tokenizer(spec).chat_template == make_tokenizer().chat_template
    # Both adapters are in, the first first.
    base = LlamaForCausalLM.from_pretrained(tiny_folder)
    for adapter in ("first", "on-top"):
        base = PeftModel.from_pretrained(base, tmp_path / adapter).merge_and_unload()  # pyright: ignore
    ids = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(load_model(spec)(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)
    # A tokenizer beside an adapter is the one that it was trained with.
    own = make_tokenizer()
    own.chat_template = "own"
    own.save_pretrained(tmp_path / "first")
    assert load_tokenizer(spec).chat_template == "own"


def test_adapter_is_an_adapter_with_its_bases_configuration_beside_it(tmp_path: Path, tiny_folder: Path):
    adapter = adapter_on(tiny_folder, tmp_path / "adapter")
    expected = load_model(ModelSpec(path=str(adapter))).state_dict()
    shutil.copy(tiny_folder / "config.json", adapter)
    found = load_model(ModelSpec(path=str(adapter))).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_reward_model_that_is_an_adapter_scores_as_peft_does(tmp_path: Path, tiny_folder: Path):
    spec = ModelSpec(path=str(adapter_on(tiny_folder, tmp_path / "adapter", task="SEQ_CLS")))
    assert load_classifier_config(spec).num_labels == 1
    base = LlamaForSequenceClassification.from_pretrained(tiny_folder, num_labels=1)
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.arange(2, 10).unsqueeze(0)
    found = load_classifier(spec)
    torch.testing.assert_close(found(ids).logits, expected(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert found.config.pad_token_id == 1
    # What is missing of an adapter would be made up: its head, or any other weight.
    saved = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(saved)
    for part, expected in (("score", "does not fit its base"), ("layers.0.self_attn.q_proj.lora_A", "missing adapter")):
        save_file({name: tensor for name, tensor in weights.items() if part not in name}, saved)
        assert expected in refusal(load_classifier, spec.path)


def test_language_models_adapter_is_no_reward_model_but_can_become_one(tmp_path: Path, tiny_folder: Path):
    spec = ModelSpec(path=str(adapter_on(tiny_folder, tmp_path / "adapter")))
    assert "is LlamaForCausalLM, not a reward model" in refusal(load_classifier, spec.path)
    made, adapted = make_classifier(spec, make_tokenizer()), load_model(spec)
    assert torch.equal(made.model.layers[0].self_attn.q_proj.weight, adapted.model.layers[0].self_attn.q_proj.weight)
    assert not made.score.weight.any()


@pytest.mark.parametrize("loader", [load_config, load_model, load_tokenizer, load_generation_config, load_classifier])
@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({"base_model_name_or_path": 5}, "does not name the adapter's base model: base_model_name_or_path is 5"),
        ({"base_model_name_or_path": ["a"]}, r"base_model_name_or_path is ['a']"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
        ({"base_model_name_or_path": ""}, "base_model_name_or_path is ''"),
        ({}, "base_model_name_or_path is None"),
        ({"base_model_name_or_path": "."}, "leads round in a circle"),
        ([], "adapter_config.json is not a JSON object, but list"),
        ("{", "adapter_config.json is not JSON that can be read"),
    ],
)
def test_adapter_that_does_not_lead_to_a_model_is_refused(tmp_path: Path, monkeypatch: Any, loader: Any, described: Any,
                                                          expected: str):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_config.json").write_text(described if described == "{" else json.dumps(described))
    message = refusal(loader, tmp_path)
    assert expected in message
    assert "adapter_config.json" in message


def test_adapter_of_an_absurd_rank_is_refused_without_making_it(tmp_path: Path, tiny_folder: Path):
    adapter = adapter_on(tiny_folder, tmp_path / "adapter")
    assert "r is 10000000000" in refusal(load_model, rewritten(adapter, "adapter_config.json", r=10**10))
    assert "does not fit its base" in refusal(load_model, rewritten(adapter, "adapter_config.json", r=10**9))


# --- numbers that no model has ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -3),
        ("num_hidden_layers", "many"),
        ("num_labels", 10**9),
        ("vocab_size", 10**12),
        ("vocab_size", -5),
        ("hidden_size", 10**30),
        ("max_position_embeddings", -1),
        ("max_position_embeddings", 10**12),
        ("text_config", {"num_hidden_layers": 10**9}),
    ],
)
@pytest.mark.parametrize("loader", [load_config, load_tokenizer, load_model, load_classifier_config])
def test_configuration_with_an_absurd_number_is_refused_before_anything_is_made(
    tiny_folder: Path, loader: Any, key: str, value: Any
):
    message = refusal(loader, rewritten(tiny_folder, "config.json", **{key: value}))
    assert f"{tiny_folder}/config.json: " in message
    assert "which no model can have" in message


def test_configuration_of_far_more_weights_than_there_are_is_refused(tiny_folder: Path):
    message = refusal(load_model, rewritten(tiny_folder, "config.json", hidden_size=10**6))
    assert message.startswith(f"{tiny_folder}/config.json describes 746,000,000 weights, but its files hold ")


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": "text"},
        {"eos_token_id": -1},
        {"eos_token_id": [[0]]},
        {"eos_token_id": [0, "x"]},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": True},
        {"eos_token_id": 10**12},
        {"temperature": "hot"},
        {"max_length": "x"},
        {"top_k": "x"},
        {"max_new_tokens": -1},
        {"pad_token_id": [1]},
    ],
)
@pytest.mark.parametrize("loader", [load_generation_config, load_model])
def test_generation_config_that_cannot_be_used_is_refused(tiny_folder: Path, loader: Any, settings: dict[str, Any]):
    message = refusal(loader, rewritten(tiny_folder, "generation_config.json", **settings))
    assert f"{tiny_folder}/generation_config.json" in message


@pytest.mark.parametrize("text", ["{", "[1]", "null", "5", "[" * 100_000, "\x00"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_settings_that_are_no_object_are_refused_with_their_file(tiny_folder: Path, name: str, text: str):
    (tiny_folder / name).write_text(text)
    assert f"{tiny_folder}/{name} is not " in refusal(load_model, tiny_folder)


def test_model_path_that_is_a_file_is_refused(tiny_folder: Path):
    path = tiny_folder / "config.json"
    assert refusal(load_model, path) == f"the model path {path} is a file: name the folder it is in"


@pytest.mark.parametrize("wrong", ["text", -1, [[0]], 1.5, True])
def test_end_token_of_an_object_that_is_none_is_refused(model: LlamaForCausalLM, wrong: Any):
    model.generation_config.eos_token_id = wrong
    with pytest.raises(ConfigError, match=r"eos_token_id is or holds .*, which is no token's number"):
        eos_token_ids(model.generation_config, make_tokenizer())
