"""Which driver quantizes a block: it depends on what the method makes and on what it scales."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantline.recipes.context import QuantizationContext


def quantize_block(ctx: "QuantizationContext", layer: int | None) -> dict[str, Any]:
    """Quantize a block of the model; what was made goes to the context's writer.

    Drivers are imported when they are used: recipes in ggml's blocks do without torch.

    Args:
        ctx: What to quantize, and how.
        layer: The number of the block; None is what lies outside all blocks.

    Returns:
        {layers: the report of each layer or tensor, transforms: the steps for the manifest}; of
        grouped integers outside the blocks also {outside: the report of embedding and head}.

    Raises:
        StageError: As the drivers do.
    """
    if ctx.recipe.storage == "ggml":
        from quantline.recipes import ggml

        return ggml.quantize_block(ctx, layer)
    if layer is None:
        from quantline.recipes import embedding_and_head

        return embedding_and_head.quantize(ctx)
    if ctx.recipe.scales_inputs:
        from quantline.recipes import input_scaling

        return input_scaling.quantize_block(ctx, layer)
    from quantline.recipes import layerwise

    return layerwise.quantize_block(ctx, layer)
