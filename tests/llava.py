"""Small Llava models of transformers with random weights, as directories, and images for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIDE, PATCH = 16, 4
NUM_ROWS = (SIDE // PATCH) ** 2  # of an image, in a prompt
IMAGE_TOKEN, VOCAB_SIZE = 100, 128
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # opinions, so that a greedy answer is no accident of rounding
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def make_llava(
    kind: str = "clip", seed: int = 0, tower_seed: int = 0, image_token: int = IMAGE_TOKEN, **more: Any
) -> Any:
    """Return a model of transformers, whose vision tower depends on ``tower_seed`` alone; ``more`` is of the text."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    is_clip = kind == "clip"
    config = LlavaConfig(
        vision_config=(CLIPVisionConfig if is_clip else SiglipVisionConfig)(**TOWER),
        text_config=LlamaConfig(**{**TEXT, **more}),
        image_token_index=image_token,
        image_seq_length=NUM_ROWS,
        vision_feature_select_strategy="default" if is_clip else "full",
        vision_feature_layer=-2 if is_clip else -1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    towers = model.model.vision_tower.parameters()
    with torch.no_grad():
        for parameters, key in ((model.parameters(), seed), (towers, tower_seed)):
            generator = torch.Generator().manual_seed(key)
            for parameter in parameters:
                parameter.normal_(std=0.2, generator=generator)
    return model


def save_llava(directory: Path, kind: str = "clip", **more: Any) -> Any:
    """Return such a model, and write it as transformers does."""
    model = make_llava(kind, **more)
    model.save_pretrained(directory)
    return model


# As Llava's: images first, then texts, which must come as parts.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def save_chatting_llava(directory: Path, **more: Any) -> Any:
    """The same with a tokenizer, a chat template and an image processor beside it."""
    from transformers import AutoTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from tests.inference.text.test_codec import write_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(directory, TEMPLATE))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(directory)
    sides = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=sides).save_pretrained(directory)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    return save_llava(directory, image_token=image_token, vocab_size=len(tokenizer), **more)


def pixels_of(seed: int) -> Tensor:
    """Return the pixels (3, SIDE, SIDE) of an image, as preprocessing would leave them."""
    return torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: Any, tokens: Sequence[int], images: Sequence[Tensor] = ()) -> Tensor:
    """Return transformers' logits (T, V) of a prompt in which ``NUM_ROWS`` tokens stand for each image."""
    pixels = torch.stack(list(images)) if images else None
    logits: Tensor = model(input_ids=torch.tensor([tokens]), pixel_values=pixels).logits[0]
    return logits


def greedy_of(model: Any, tokens: Sequence[int], images: Sequence[Tensor], num_tokens: int) -> list[int]:
    """Return what transformers draws greedily, without a cache."""
    found = list(tokens)
    for _ in range(num_tokens):
        found.append(int(logits_of(model, found, images)[-1].argmax()))
    return found[len(tokens) :]
