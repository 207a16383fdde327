"""Voxtral as benchmark cases: its audio encoder, and the whole of it with a scheme for each half."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.build import BF16, Made, Step, first, seeded


def voxtral_encoder(device: str, layers: int = 32) -> Made:
    """The audio encoder of Voxtral, 30 s of audio."""
    from transformers import VoxtralEncoderConfig
    from transformers.models.voxtral.modeling_voxtral import VoxtralEncoder

    model = seeded(lambda: VoxtralEncoder(VoxtralEncoderConfig(num_hidden_layers=layers)), device)
    x = torch.randn(1, 128, 3000, device=device, dtype=BF16, generator=torch.Generator(device).manual_seed(0))
    return model, partial(first, x=x)


AUDIO_TOKENS, AUDIO_TOKEN = 375, 24  # of 30 s; four of the encoder's 1500 frames make one


def voxtral(device: str, tokens: int, config: dict[str, Any] | None = None) -> Made:
    """Encoder, projector and decoder: the logits after 30 s of audio and text, `tokens` in all; `config` for a smaller one."""
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    whole = VoxtralConfig(**{"audio_token_id": AUDIO_TOKEN, **(config or {})})
    model = seeded(lambda: VoxtralForConditionalGeneration(whole), device)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, 128, 3000, device=device, dtype=BF16, generator=generator)
    ids = torch.randint(AUDIO_TOKEN + 1, 256, (1, tokens), device=device, generator=generator)
    ids[:, :AUDIO_TOKENS] = AUDIO_TOKEN

    def bind(compiled: Any) -> Step:
        return lambda: compiled(input_ids=ids, input_features=x, use_cache=False, logits_to_keep=1).logits

    return model, bind
