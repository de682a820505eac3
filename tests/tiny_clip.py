"""A CLIP made from a configuration, small and random."""

import torch
from conftest import tiny_tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel


def save_clip(folder):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shape | {"vocab_size": 100, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    vision = shape | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tiny_tokenizer(folder).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return folder
