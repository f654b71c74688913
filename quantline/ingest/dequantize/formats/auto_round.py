"""AutoRound checkpoints, which have the layout of GPTQ or of AWQ, as `packing_format` says."""

from collections.abc import Mapping
from typing import Any

from quantline.ingest.dequantize.dequantizer import Dequantizer, register_dequantizer
from quantline.ingest.dequantize.formats.awq import Awq
from quantline.ingest.dequantize.formats.gptq import LESS_ONE, Gptq

PACKING = "packing_format"
# How the layout is called → the dequantizer, and the format that it has to know.
LAYOUTS: dict[str, tuple[type[Dequantizer], str]] = {
    "auto_round:auto_gptq": (Gptq, LESS_ONE),
    "auto_round:auto_awq": (Awq, "gemm"),
}
# Options of AutoRound that say how it was made.
MADE_BY = frozenset(
    {
        *(
            "act_bits",
            "act_data_type",
            "act_dynamic",
            "act_group_size",
            "act_sym",
            "amp",
            "autoround_version",
        ),
        *(
            "batch_size",
            "block_name_to_quantize",
            "dataset",
            "enable_minmax_tuning",
            "gradient_accumulate_steps",
        ),
        *(
            "enable_norm_bias_tuning",
            "enable_quanted_input",
            "iters",
            "low_gpu_mem_usage",
            "lr",
            "minmax_lr",
        ),
        *(
            "nsamples",
            "quant_block_list",
            "scale_dtype",
            "seqlen",
            "super_bits",
            "super_group_size",
        ),
        *("to_quant_block_names", "train_bs", "backend"),
    }
)


@register_dequantizer("auto-round", "intel/auto-round")
class AutoRound(Dequantizer):
    """Reads nothing itself: what it makes is a Gptq or an Awq."""

    def __new__(cls, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
        """Return the dequantizer of the layout."""
        packing = str(settings.get(PACKING, settings.get("backend")))
        if packing not in LAYOUTS or settings.get("data_type", "int") != "int":
            unread = super().__new__(cls)
            unread.method = "auto-round"
            known = ", ".join(LAYOUTS)
            raise unread.refusal(
                f"integers in a {PACKING} among {known}",
                f"{settings.get('data_type', 'int')} in {packing}",
            )
        found, layout = LAYOUTS[packing]
        taken = {**dict.fromkeys(MADE_BY), PACKING: None, "data_type": None, "quant_method": None}
        rest = {key: value for key, value in settings.items() if key not in taken}
        mixed = {"dynamic": rest.pop("extra_config")} if rest.get("extra_config") else {}
        rest.pop("extra_config", None)
        inner = {"quant_method": "auto-round", "checkpoint_format": layout, **rest, **mixed}
        if found is Awq and "sym" in rest:
            inner["zero_point"] = not rest["sym"]
        return found(inner, config)
