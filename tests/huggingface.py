"""Small random Hugging Face models, with inputs, and attention without a model, for the tests of the integration."""

import torch
import transformers as T
from torch import nn

LAYERS, M = 2, 8
SIZES = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 66, "pad_token_id": 0}
IMAGE = SIZES | {"image_size": 24, "patch_size": 4}  # 36 patches
WHISPER = {
    **{"d_model": 32, "encoder_layers": LAYERS, "decoder_layers": 1, "vocab_size": 50, "pad_token_id": 0},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
    **{"num_mel_bins": 4, "max_source_positions": 40, "decoder_start_token_id": 1, "eos_token_id": 2},
}
MODERN = TEXT | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 6}
WAV2VEC2 = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
SWIN = {"image_size": 24, "patch_size": 4, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 3}


def modern_bert(every=1):
    return T.ModernBertModel(T.ModernBertConfig(**MODERN, global_attn_every_n_layers=every))


TEXT_MODELS = {
    "bert": lambda: T.BertModel(T.BertConfig(**TEXT)),
    "roberta": lambda: T.RobertaModel(T.RobertaConfig(**TEXT)),
    "distilbert": lambda: T.DistilBertModel(
        T.DistilBertConfig(dim=32, n_layers=LAYERS, n_heads=2, hidden_dim=32, vocab_size=50, max_position_embeddings=66)
    ),
    "albert": lambda: T.AlbertModel(T.AlbertConfig(**TEXT, embedding_size=16)),
    "electra": lambda: T.ElectraModel(T.ElectraConfig(**TEXT, embedding_size=16)),
    "modernbert": modern_bert,
    "siglip-text": lambda: T.SiglipTextModel(T.SiglipTextConfig(**TEXT, bos_token_id=1, eos_token_id=2)),
}
OTHER_MODELS = {
    "vit": lambda: T.ViTModel(T.ViTConfig(**IMAGE)),
    "clip": lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**IMAGE)),
    "siglip": lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**IMAGE)),
    "wav2vec2": lambda: T.Wav2Vec2Model(T.Wav2Vec2Config(**SIZES, **WAV2VEC2, apply_spec_augment=False)),
    "whisper": lambda: T.WhisperModel(T.WhisperConfig(**WHISPER)).encoder,
}
MODELS = TEXT_MODELS | OTHER_MODELS


LLAMA = TEXT | {"num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
# Decoders that are used as encoders.
BIDIRECTIONAL = {
    "llama": lambda **options: T.LlamaModel(T.LlamaConfig(**LLAMA, **options)),
    "qwen3": lambda **options: T.Qwen3Model(T.Qwen3Config(**LLAMA, **options)),
    "mistral": lambda **options: T.MistralModel(T.MistralConfig(**LLAMA, sliding_window=None, **options)),
}


def build(name, implementation="sdpa"):
    """The same weights every time, large enough that the attention is far from uniform."""
    torch.manual_seed(0)
    model = MODELS[name]().eval() if isinstance(name, str) else name().eval()
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.2)
    model.set_attn_implementation(implementation)
    return model


def inputs(name, length=40, valid=None):
    """Two samples of 36 to 40 tokens, or of ``length`` where the first has ``valid`` and the rest is padding."""
    generator = torch.Generator().manual_seed(1)
    if name in ("vit", "clip", "siglip"):
        return {"pixel_values": torch.randn(2, 3, 24, 24, generator=generator)}
    if name == "wav2vec2":
        return {"input_values": torch.randn(2, 400, generator=generator)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 4, 80, generator=generator)}
    ids = torch.randint(3, 50, (2, 60), generator=generator)[:, :length]
    mask = torch.ones_like(ids)
    mask[0, valid:] = 0 if valid is not None else 1
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def hidden(model, batch):
    return model(**batch).last_hidden_state


class Attention(nn.Module):
    """What the function reads of an attention module."""

    is_causal = False

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        raise NotImplementedError


class EitherAttention(Attention):
    def forward(self, hidden_states, key_value_states=None, attention_mask=None, **kwargs):
        raise NotImplementedError


class CrossAttention(Attention):
    is_decoder = False
