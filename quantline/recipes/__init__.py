"""What a recipe does to a whole model: the drivers that hand each layer to its method."""
