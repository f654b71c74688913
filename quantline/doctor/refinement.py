"""What the refinement of a recipe takes: operations, memory and room on the disk."""

from quantline.config.recipes import GroupedRecipe, Recipe
from quantline.config.texts import Calibration
from quantline.doctor.sizes import ModelSizes
from quantline.recipes.refinement.schedule import held_out_sequences

CHUNK_VALUES = 1 << 24  # of calibration/output_moments.py, which imports torch (a test compares)
CHUNKS = 7  # of logits, and of what is made of them, at once
BLOCKS = 8  # times one block's float32 weights, with gradients
RESIDENT_STATES = 1 << 30  # of a set of hidden states in memory; a larger one lies in a file
GROUP = 32  # weights that share a scale, at the fewest


def refinement_operations(recipe: Recipe, text: Calibration, sizes: ModelSizes) -> float:
    """Return the operations of all steps, of the unquantized model, and of what is measured."""
    if not isinstance(recipe, GroupedRecipe) or not recipe.refine.steps:
        return 0.0
    weights, head = sizes.weights, sizes.head_weights
    stepped = recipe.refine.steps * recipe.refine.sequences
    held = held_out_sequences(text.sequences, recipe.refine.sequences)
    once = min(stepped, text.sequences - held) + held
    # Forwards, forwards again and backwards, which is as much as both.
    operations = stepped * (8 * weights + 6 * head)
    operations += once * 2 * weights + 2 * held * (2 * weights + 4 * head)
    return float(text.length * operations)


def refinement_bytes(recipe: Recipe, text: Calibration, sizes: ModelSizes) -> float:
    """Return the bytes that a refinement holds at most, beside those of its process."""
    if not isinstance(recipe, GroupedRecipe) or not recipe.refine.steps:
        return 0.0
    tokens = recipe.refine.sequences * text.length
    heads = 2 if recipe.safetensors_head else 1
    states = 4 * sizes.hidden * tokens * (sizes.blocks + 1)
    embedded = 4 * sizes.hidden * text.sequences * text.length
    return (
        BLOCKS * 4 * sizes.block_weights
        + heads * 4 * sizes.head_weights
        + CHUNKS * 4 * min(CHUNK_VALUES, tokens * sizes.vocabulary)
        + min(RESIDENT_STATES, states)
        + min(RESIDENT_STATES, embedded)
    )


def refinement_disk(recipe: Recipe, text: Calibration, sizes: ModelSizes) -> float:
    """Return the bytes that a refinement has on the disk until it is done."""
    if not isinstance(recipe, GroupedRecipe) or not recipe.refine.steps:
        return 0.0
    states = 4 * sizes.hidden * text.length
    step = states * recipe.refine.sequences * (sizes.blocks + 1)
    # What moves, with Adam's two means, of two steps; and the result.
    moving = (2 * 3 + 1) * 4 * sizes.weights / GROUP
    return states * text.sequences + step + moving
