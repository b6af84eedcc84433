"""Which rows of which of a file's tensors make up each tensor of our modules."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

Tensors = Mapping[str, Any]  # by key, anything that has a `shape`


class Rows(NamedTuple):
    """Rows [start, stop) of the tensor `key` of a file; by default all."""

    key: str
    start: int = 0
    stop: int | None = None


class KeyNames(NamedTuple):
    """A way to name a component's tensors: some keys match `pattern`, after any prefix.

    rows(name, tensors): the rows that make up the module's tensor `name`, in order.
    """

    part: str
    name: str
    pattern: str
    rows: Callable[[str, Tensors], list[Rows]]


def replaced(table: dict[str, str]) -> Callable[[str, Tensors], list[Rows]]:
    """Names with these parts of ours replaced by theirs, in this order."""

    def rows(name: str, tensors: Tensors) -> list[Rows]:
        for our, their in table.items():
            name = name.replace(our, their)
        return [Rows(name)]

    return rows


same_name = replaced({})
to_diffusers = replaced(
    {
        "double_blocks.": "transformer_blocks.",
        "single_blocks.": "single_transformer_blocks.",
        "img_attn.norm.": "attn.norm_",
        "txt_attn.norm.": "attn.norm_added_",
        ".norm.": ".attn.norm_",
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "modulation.lin": "norm.linear",
        "query_norm": "q",
        "key_norm": "k",
        ".scale": ".weight",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_mlp": "ff.net",
        "txt_mlp": "ff_context.net",
        "net.0": "net.0.proj",
        "linear2": "proj_out",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in": "time_text_embed.timestep_embedder",
        "vector_in": "time_text_embed.text_embedder",
        "guidance_in": "time_text_embed.guidance_embedder",
        "in_layer": "linear_1",
        "out_layer": "linear_2",
    }
)
JOINED = {  # one layer of ours, several of theirs
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
}


def flux_from_diffusers(name: str, tensors: Tensors) -> list[Rows]:
    names = [name]
    for our, theirs in JOINED.items():
        if our in name:
            names = [name.replace(our, their) for their in theirs]
    rows = [row for each in names for row in to_diffusers(each, tensors)]
    key = rows[0].key
    if key.startswith("norm_out.") and key in tensors:  # Theirs is (scale, shift).
        half = tensors[key].shape[0] // 2
        return [Rows(key, half), Rows(key, 0, half)]
    return rows


def controlnet_from_diffusers(name: str, tensors: Tensors) -> list[Rows]:
    """InstantX's, and XLabs' after diffusers' conversion."""
    if name.startswith("controlnet_"):
        return [Rows(name)]
    if hint := re.fullmatch(r"input_hint_block\.(\d+)\.(.+)", name):
        their = {"0": "conv_in", "14": "conv_out"}
        their = their.get(hint[1], f"blocks.{int(hint[1]) // 2 - 1}")
        return [Rows(f"input_hint_block.{their}.{hint[2]}")]
    return flux_from_diffusers(name, tensors)


def t5_from_hf(name: str, tensors: Tensors) -> list[Rows]:
    """Files have the embeddings as shared.weight, under the other name, or both."""
    twin = "encoder.embed_tokens.weight"
    is_twin = name == "shared.weight" and name not in tensors and twin in tensors
    return [Rows(twin if is_twin else name)]


@cache
def llama_cpp_names(layers: int) -> Any:
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, layers)


def t5_from_llama_cpp(name: str, tensors: Tensors) -> list[Rows]:
    names = llama_cpp_names(count(tensors, r"enc\.blk\.(\d+)\."))
    return [Rows(names.get_name(name, try_suffixes=(".weight",)))]


openai_names = replaced(
    {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.": "",
        "text_model.final_layer_norm.": "ln_final.",
        "text_model.encoder.layers.": "transformer.resblocks.",
        ".self_attn.": ".attn.",
        ".layer_norm": ".ln_",
        ".fc1.": ".c_fc.",
        ".fc2.": ".c_proj.",
    }
)


def clip_from_openai(name: str, tensors: Tensors) -> list[Rows]:
    (found,) = openai_names(name, tensors)
    third = re.fullmatch(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)", found.key)
    if not third:
        return [found]
    key = f"{third[1]}in_proj_{third[3]}"
    width = tensors[key].shape[0] // 3 if key in tensors else 0
    start = "qkv".index(third[2]) * width
    return [Rows(key, start, start + width)]


DIFFUSERS_AE = {
    r"\.mid\.block_1\.": ".mid_block.resnets.0.",
    r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    r"\.mid\.attn_1\.norm\.": ".mid_block.attentions.0.group_norm.",
    r"\.mid\.attn_1\.proj_out\.": ".mid_block.attentions.0.to_out.0.",
    r"\.mid\.attn_1\.([qkv])\.": r".mid_block.attentions.0.to_\1.",
    r"\.(down|up)\.(\d+)\.block\.": r".\1_blocks.\2.resnets.",
    r"\.(down|up)\.(\d+)\.\1sample\.": r".\1_blocks.\2.\1samplers.0.",
    r"\.norm_out\.": ".conv_norm_out.",
    r"\.nin_shortcut\.": ".conv_shortcut.",
}
OLD_AE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def ae_name_in_diffusers(name: str, levels: int) -> str:
    """`name` in diffusers' autoencoder of so many levels, the decoder's counted from its end."""
    if level := re.match(r"decoder\.up\.(\d+)", name):
        name = f"decoder.up.{levels - 1 - int(level[1])}{name[level.end() :]}"
    for our, their in DIFFUSERS_AE.items():
        name = re.sub(our, their, name)
    return name


def ae_from_diffusers(name: str, tensors: Tensors) -> list[Rows]:
    name = ae_name_in_diffusers(name, count(tensors, r"decoder\.up_blocks\.(\d+)\."))
    for new, old in OLD_AE.items():
        name = name if name in tensors else name.replace(new, old)
    return [Rows(name)]


def count(tensors: Tensors, pattern: str) -> int:
    """How many blocks there are, numbered from 0, where `pattern` finds a key's number; at most
    one for each tensor, as modules of that many blocks are made."""
    found = [match for key in tensors if (match := re.match(pattern, key))]
    last = max((int(match[1][:9]) for match in found), default=-1)
    return min(1 + last, len(tensors))


clip_from_hf = replaced({"text_model.": ""})  # In a file, text_model. counts as the prefix.
from_xlabs = replaced({"controlnet_x_embedder.": "pos_embed_input."})
DIFFUSERS_CONTROLNET = r"controlnet_(?:x_embedder|blocks\.\d+)\."
KEY_NAMES = (
    KeyNames("flux", "BFL", r"double_blocks\.\d+\.img_attn\.", same_name),
    KeyNames("flux", "diffusers", r"transformer_blocks\.\d+\.attn\.", flux_from_diffusers),
    KeyNames("t5", "Hugging Face", r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.", t5_from_hf),
    KeyNames("t5", "llama.cpp", r"enc\.blk\.\d+\.attn_q\.", t5_from_llama_cpp),
    KeyNames("clip", "Hugging Face", r"encoder\.layers\.\d+\.self_attn\.", clip_from_hf),
    KeyNames("clip", "OpenAI", r"transformer\.resblocks\.\d+\.attn\.", clip_from_openai),
    KeyNames("ae", "BFL", r"decoder\.up\.\d+\.block\.", same_name),
    KeyNames("ae", "diffusers", r"decoder\.up_blocks\.\d+\.resnets\.", ae_from_diffusers),
    KeyNames("controlnet", "XLabs", r"(?:pos_embed_input|input_hint_block\.0)\.", from_xlabs),
    KeyNames("controlnet", "diffusers", DIFFUSERS_CONTROLNET, controlnet_from_diffusers),
    KeyNames("siglip", "Hugging Face", r"embeddings\.patch_embedding\.bias", same_name),
    KeyNames("redux", "BFL", r"redux_(?:up|down)\.", same_name),
)

# Keys that a component's files may hold but its module does not use.
IGNORED = {
    "t5": r"encoder\.embed_tokens\.|decoder\.|lm_head\.|dec\.|output\.weight$",
    "clip": r"(embeddings\.)?position_ids$|text_projection|logit_scale$|vision_model\.|visual",
    "siglip": r"head\.|embeddings\.position_ids$",
}
