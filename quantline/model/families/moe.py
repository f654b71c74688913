"""Llama's block with a mixture of experts: Mixtral and Qwen3-MoE."""

from dataclasses import replace

from quantline.model.families.llama import LLAMA, LLAMA_GGUF
from quantline.model.family import Family, GgufFamily, moe_block, register_family

MIXTRAL_BLOCK = moe_block("block_sparse_moe", "w1", "w3", "w2")
MIXTRAL = Family(
    block=MIXTRAL_BLOCK,
    sparse=MIXTRAL_BLOCK,
    renamed={"mlp": "block_sparse_moe"},
    gguf=replace(LLAMA_GGUF, counts_as_70b="never"),
)
# Some of its blocks may be dense.
QWEN3_MOE = Family(
    block=LLAMA.block,
    sparse=moe_block("mlp", "gate_proj", "up_proj", "down_proj"),
    gguf=GgufFamily(
        "qwen3moe",
        required={"norm_topk_prob": (True, False)},
        ignores_window=True,
        biases="none",
        all_blocks_sparse=True,
    ),
)

register_family("mixtral", MIXTRAL)
register_family("qwen3_moe", QWEN3_MOE)
