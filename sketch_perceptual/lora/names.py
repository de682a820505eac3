"""Names of the parts of a LoRA: of diffusers, kohya's trainers, PEFT and the original Stable Diffusion.

Modules have diffusers' names: `unet.<module>` or `text_encoder.text_model.<module>`.
"""

import re

PARTS = {
    "down": (".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight", ".lora_A.weight"),
    "up": (".lora.up.weight", "_lora.up.weight", ".lora_linear_layer.up.weight", ".lora_B.weight"),
    "magnitude": (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale"),
    "alpha": (".alpha",),
}
PART = {suffix: part for part, suffixes in PARTS.items() for suffix in suffixes}
PART |= {".lora_down.weight": "down", ".lora_up.weight": "up"}

# Prefixes of names, and the model they stand for; "" where the rest of the name shows it.
PREFIXES = {
    "base_model.model.": "",
    "unet.": "unet.",
    "model.diffusion_model.": "unet.",
    "diffusion_model.": "unet.",
    "text_encoder.": "text_encoder.",
    "text_encoders.clip_l.transformer.": "text_encoder.",
    "text_encoders.clip_h.transformer.": "text_encoder.",
    "lora_unet_": "unet.",
    "lora_te_": "text_encoder.",
    "lora_te1_": "text_encoder.",
}
# Words of module names, between dots; in kohya's names there are underscores both between and within them.
WORDS = """down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers transformer_blocks attn1 attn2
    to_q to_k to_v to_out ff net proj proj_in proj_out conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj
    time_embedding linear_1 linear_2 text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2
    input_blocks middle_block output_blocks in_layers emb_layers out_layers skip_connection op out time_embed"""
WORD = re.compile(rf"(?:{'|'.join(sorted(WORDS.split(), key=len, reverse=True))}|[0-9]{{1,3}})(?=_|$)")

# Spellings of older diffusers and transformers, and of the original Stable Diffusion, outside its numbered blocks.
SPELLINGS = {
    r"^encoder\.layers\.": "text_model.encoder.layers.",  # transformers 5.6
    r"\.processor\.to_": ".to_",
    r"self_attn\.to_([qkv])$": r"self_attn.\1_proj",
    r"self_attn\.to_out$": "self_attn.out_proj",
    r"\.to_out$": ".to_out.0",
    r"^input_blocks\.0\.0$": "conv_in",
    r"^out\.2$": "conv_out",
    r"^time_embed\.0$": "time_embedding.linear_1",
    r"^time_embed\.2$": "time_embedding.linear_2",
}
ORIGINAL_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.([0-9]{1,2})\.(?:([0-2])\.)?(.+)")
RESNET_OR_ATTENTION = {"0": "resnets", "1": "attentions"}
MIDDLE_BLOCK = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
ORIGINAL_LAYERS = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

# Modules of Stable Diffusion 1 and 2: widths of input and output, and kernels. Widths of one name are equal, `block`
# and `inner` within a block; those without a name are free.
LINEAR, CONV_1, CONV_3, LINEAR_OR_CONV = ((),), ((1, 1),), ((3, 3),), ((), (1, 1))
N = "(?:0|[1-9][0-9]?)"
UNET_BLOCK = rf"(unet\.(?:(?:down|up)_blocks\.{N}|mid_block))\."
TRANSFORMER = rf"{UNET_BLOCK}attentions\.{N}\.transformer_blocks\.0\."
RESNET = rf"{UNET_BLOCK}resnets\.{N}\."
TEXT_LAYER = rf"(text_encoder)\.text_model\.encoder\.layers\.{N}\."
Description = tuple[str, str, tuple[tuple[int, ...], ...]]
MODULES: dict[str, Description] = {
    rf"{UNET_BLOCK}attentions\.{N}\.proj_in": ("block", "inner", LINEAR_OR_CONV),
    rf"{UNET_BLOCK}attentions\.{N}\.proj_out": ("inner", "block", LINEAR_OR_CONV),
    rf"{TRANSFORMER}(?:attn1\.to_[qkv]|attn2\.to_q|attn[12]\.to_out\.0)": ("inner", "inner", LINEAR),
    rf"{TRANSFORMER}attn2\.to_[kv]": ("text", "inner", LINEAR),
    rf"{TRANSFORMER}ff\.net\.0\.proj": ("inner", "inner*8", LINEAR),
    rf"{TRANSFORMER}ff\.net\.2": ("inner*4", "inner", LINEAR),
    rf"{RESNET}conv1": ("", "block", CONV_3),
    rf"{RESNET}conv2": ("block", "block", CONV_3),
    rf"{RESNET}time_emb_proj": ("time", "block", LINEAR),
    rf"{RESNET}conv_shortcut": ("", "block", CONV_1),
    rf"{UNET_BLOCK}(?:down|up)samplers\.0\.conv": ("block", "block", CONV_3),
    r"(unet)\.conv_(?:in|out)": ("", "", CONV_3),
    r"(unet)\.time_embedding\.linear_1": ("", "time", LINEAR),
    r"(unet)\.time_embedding\.linear_2": ("time", "time", LINEAR),
    rf"{TEXT_LAYER}self_attn\.(?:[qkv]|out)_proj": ("text", "text", LINEAR),
    rf"{TEXT_LAYER}mlp\.fc1": ("text", "mlp", LINEAR),
    rf"{TEXT_LAYER}mlp\.fc2": ("mlp", "text", LINEAR),
}
# Their maximum in the published models; smaller models, such as those of the tests, may have any width.
WIDEST = {"block": 1280, "inner": 1280, "text": 1024, "time": 1280, "mlp": 4096}

# Other kinds of files, or of parts of files, by a pattern of their keys.
KINDS = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.[ab][12m]\.weight$": "GLoRA",
    r"\.oft_|\.boft_|\.rescale$": "OFT or BOFT",
    r"\.on_input$|\.ia3_": "IA3",
    r"\.vera_|\.randlora_": "VeRA",
    r"\.lora_mid\.weight$": "a LoRA of convolutions with Tucker decomposition (lora_mid)",
    r"\.[wb]_norm$": "training of norms",
    r"\.diff_b$|\.lora_B\.bias$|\.lora\.up\.bias$": "training of biases",
    r"\.diff$|\.set_weight$": "full differences of weights",
    r"lora_embedding_": "a LoRA of token embeddings",
    r"motion_modules": "a motion LoRA of AnimateDiff",
    r"controlnet|lllite": "a LoRA of a ControlNet",
    r"ip_adapter|image_proj": "an IP-Adapter",
    r"_custom_diffusion\.": "Custom Diffusion",
    r"double_blocks|single_blocks|single_transformer_blocks": "a LoRA of FLUX",
    r"joint_blocks|^lora_te3_|^text_encoder_3": "a LoRA of SD-3",
    r"^(?:(?:base_model\.model|diffusion_model|transformer)\.)?(?:transformer_blocks|blocks)\.|^transformer\."
    r"|^lora_(?:transformer|unet_blocks)_": "a LoRA of a diffusion transformer",
    r"^lora_prior_": "a LoRA of Stable Cascade",
    r"^(?:base_model\.model\.)?model\.layers\.": "a LoRA of a language model",
    r"^emb_params$|^clip_[lg]$|^string_to_param|^<.*>$|^bundle_emb\.": "a textual inversion",
    r"^(?!.*lora)(?:model\.diffusion_model|cond_stage_model|first_stage_model|conditioner)\.": "a whole model",
    r"^(?!.*lora)(?:unet\.)?(?:(?:down|up)_blocks|mid_block|conv_in|text_model)\.": "a whole model",
    r"^lora_te2_|text_encoder_2|add_embedding|label_emb|transformer_blocks[._](?!0[._])[0-9]": "a LoRA of SDXL",
}


def locate(key: str) -> tuple[str, str]:
    """Split a tensor's name, of any trainer, into its module, as diffusers writes it, and its part; "" if unknown."""
    key = re.sub(r"\.default(?=\.weight$|$)", "", key)  # PEFT's name of an adapter
    for suffix, part in PART.items():
        if key.endswith(suffix):
            return module_name(key.removesuffix(suffix)), part
    return "", ""


def module_name(name: str) -> str:
    """Return diffusers' name of a module of Stable Diffusion 1 or 2; "" if there is no such module."""
    model = ""
    for prefix, prefix_model in PREFIXES.items():
        if name.startswith(prefix) and not model:
            name, model = name.removeprefix(prefix), prefix_model
            if prefix.startswith("lora_"):
                words = WORD.findall(name)
                if "_".join(words) != name:
                    return ""
                name = ".".join(words)
    for pattern, spelling in SPELLINGS.items():
        name = re.sub(pattern, spelling, name)
    if block := ORIGINAL_BLOCK.fullmatch(name):
        name = original_module(*block.groups())
    model = model or ("text_encoder." if name.startswith("text_model.") else "unet.")
    return name if description(name := model + name) else ""


def original_module(side: str, index: str, part: str, rest: str) -> str:
    """Return diffusers' name of a module in a numbered block of the original U-Net (three per resolution)."""
    rest = ORIGINAL_LAYERS.get(rest, rest)
    if side == "middle_block":
        return f"mid_block.{MIDDLE_BLOCK.get(index)}.{rest}"
    block, layer = divmod(int(index) - (side == "input_blocks"), 3)
    name = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{block}"
    if rest in ("op", "conv"):
        return f"{name}.{'down' if rest == 'op' else 'up'}samplers.0.conv"
    return f"{name}.{RESNET_OR_ATTENTION.get(part)}.{layer}.{rest}"


def description(module: str) -> tuple[str, Description] | None:
    """Return the block that a module is in and its row of MODULES, or None for an unknown module."""
    for pattern, row in MODULES.items():
        if match := re.fullmatch(pattern, module):
            return match[1], row
    return None


def kohya_name(module: str) -> str:
    model, _, name = module.partition(".")
    return f"lora_{'unet' if model == 'unet' else 'te'}_{name.replace('.', '_')}"
